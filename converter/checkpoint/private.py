"""Models in private folders: what is loaded is what we write, never somebody else's folder.

transformers looks for code in more places than one can inspect, and they change between inspection
and load: Python files that any `auto_map` names, `custom_generate/`, adapters, kernels, weights in
other layouts. A private folder holds the weights (symbolic links to the safetensors that were
checked), the small data files, a config.json without keys that name code, and the Python files that
this version renders, where any are wanted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from converter.checkpoint.format import format_of_plan, render_code, render_config
from converter.checkpoint.writer import carry_files
from converter.common.errors import CheckpointError, SourceError
from converter.common.files import read_json_object, write_json, write_text
from converter.model.code_keys import data_only
from converter.model.source import Source
from converter.model.weights import INDEX_NAME, contained
from converter.plan.plan import Plan


@contextmanager
def private_source(source: Source) -> Iterator[Path]:
    """A folder that transformers' own class for the source loads, and that holds no code."""
    with _private_folder() as folder:
        _fill(source, folder, source.native_config)
        yield folder


@contextmanager
def private_hybrid(
    source: Source, plan: Plan, config: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """A folder with the code of this version that computes a plan of the source.

    Args:
        source, plan: the model, and which layers slide.
        config: a checkpoint's own config.json, of which all is taken but what names code; None
            for the one that the plan makes.
    """
    rendered = render_config(source, plan)
    with _private_folder() as folder:
        if config is None:
            config = rendered
        else:
            own = data_only(config, source.folder / "config.json")
            config = own | {"auto_map": rendered["auto_map"]}
        _fill(source, folder, config)
        for name, text in render_code(format_of_plan(source, plan)).items():
            write_text(folder / name, text)
        yield folder


@contextmanager
def runnable(checkpoint: Path, source: Source, plan: Plan, *, trust: bool) -> Iterator[Path]:
    """A folder to load a checkpoint from: its own when it is trusted, else a private one."""
    if trust:
        yield checkpoint
        return
    config = read_json_object(checkpoint / "config.json", CheckpointError)
    with private_hybrid(source, plan, config) as folder:
        yield folder


@contextmanager
def private_tokenizer(folder: Path, config: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder with a model's tokenizer alone.

    Args:
        folder: where the model is.
        config: the model's config.json; None for the one in its folder, if any.

    Raises:
        SourceError: a file of the tokenizer leaves the folder, or is not what its name says.
    """
    path = folder / "config.json"
    if config is None and path.is_file():
        config = read_json_object(path, SourceError)
    with _private_folder() as private:
        carry_files(folder, private)
        if config is not None:
            write_json(private / path.name, data_only(config, path))
        yield private


@contextmanager
def _private_folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="hybridize-") as temporary:
        # transformers names its copy of the code after the folder; a fixed name keeps it to one.
        folder = Path(temporary) / "hybridize_model"
        folder.mkdir()
        yield folder


def _fill(source: Source, folder: Path, config: Mapping[str, Any]) -> None:
    """Everything but the code. Nothing is copied that is large, whatever disk the folder is on."""
    for shard in source.weights.shards:
        (folder / shard).symlink_to(contained(source.folder, shard).resolve())
    if (source.folder / INDEX_NAME).exists():
        shutil.copyfile(contained(source.folder, INDEX_NAME), folder / INDEX_NAME)
    carry_files(source.folder, folder)
    write_json(folder / "config.json", config)
