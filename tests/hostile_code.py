"""Code in every place where transformers, tokenizers, jinja or llama.cpp could look for it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ggufs import make_bpe_tokenizer
from tests.hostile_cases import CODE, Bomb, Case, Command, Place, case

# Where a load may look for Python files: by a name in a configuration, by a name of its own, or
# because the file is carried along with a tokenizer or a licence.
_FILES = (
    *("{}.py", "hybrid/{}.py", "tokenizer_{}.py", "vocab.py", "LICENSE.py", "chat_template.py"),
    *("__init__.py", "sitecustomize.py", "torch.py", "custom_generate/generate.py"),
    "additional_chat_templates/{}.py",
)
_PICKLES = (
    *("training_args.bin", "adapter_model.bin", "tokenizer_{}.pkl", ".metadata", "optimizer.pt"),
)
_AUTO = (
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor"),
    "AutoFeatureExtractor",
)
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def names_of_code(stem: str) -> dict[str, Any]:
    """Keys of a configuration that name the code, or other repositories and files."""
    return {
        "auto_map": dict.fromkeys(_AUTO, f"hybrid/{stem}.Custom"),
        **dict.fromkeys(_KERNELS, f"owner/{stem}"),
        "custom_pipelines": {"text-generation": {"impl": f"{stem}.Custom", "pt": ["AutoModel"]}},
        "custom_generate": f"owner/{stem}",
        "model_file": f"{stem}.py",
        "transformers_weights": "adapter_model.bin",
        "_name_or_path": f"owner/{stem}",
        "speculators_config": {"verifier": {"name_or_path": f"owner/{stem}"}},
        "fusion_config": {stem: True},
    }


def plant(folder: Path, stem: str) -> None:
    """Put code into every place of a model or checkpoint."""
    for name in (name.format(stem) for name in (*_FILES, *_PICKLES)):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(CODE.encode() if path.suffix == ".py" else pickle.dumps(Bomb()))
    (folder / "custom_generate" / "requirements.txt").write_text(f"{stem}\n")
    # transformers takes weights of this name before the model's own.
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(pickle.dumps(Bomb()))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": f"owner/{stem}"}
    adapter["auto_mapping"] = {"base_model_class": "Custom", "parent_library": stem}  # type: ignore[assignment]
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    # A processor's files are looked for only when they are there.
    for name in ("config", "tokenizer_config", "generation_config", "processor_config"):
        path = folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(found | names_of_code(stem)))
    tokenizer = folder / "tokenizer_config.json"
    legacy = [None, f"tokenizer_{stem}.Custom"]
    told = json.loads(tokenizer.read_text()) | {"auto_map": legacy, "tokenizer_class": "Custom"}
    tokenizer.write_text(json.dumps(told))


def _source(place: Place, run: Callable[[Place], Command]) -> Command:
    # What is left beside the model must not have this name: see tests/test_hostile.py.
    plant(place.model, "evil_own")
    return run(place)


def _checkpoint(place: Place, command: str, *options: object) -> Command:
    out = place.converted()
    plant(out, "hidden")
    return (command, out, *options, *_text(place, command))


def _text(place: Place, command: str) -> Command:
    """What `evaluate` needs beside the model."""
    if command != "evaluate":
        return ()
    path = place.beside / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return ("--tasks", "none", "--text", path, "--text-tokens", 100, "--speed-runs", 0, "-q")


def _inspect(place: Place) -> Command:
    return ("inspect", place.model)


def _calibrate(place: Place) -> Command:
    options = ("--method", "nll-restore", "--window", 16, "--samples", 1, "--length", 300, "-q")
    return ("calibrate", place.model, "--out", place.beside / "scores.json", *options)


def _convert(place: Place) -> Command:
    return place.convert("--verify", "-q")


def _evaluate(place: Place) -> Command:
    return ("evaluate", place.model, *_text(place, "evaluate"))


def _class(place: Place, name: str) -> Command:
    """A class of transformers that is no tokenizer, and looks for code beside the model."""
    plant(place.model, "evil_own")
    place.edit("tokenizer_config.json", tokenizer_class=name, auto_map=None)
    return _calibrate(place)


_SHELL = "{{ cycler.__init__.__globals__.os.system('touch RAN') }}"


def _gguf(place: Place) -> Command:
    from tests.conftest import run_cli

    make_bpe_tokenizer(place.model)
    out, file = place.converted(), place.beside / "out.gguf"
    plant(out, "hidden")
    (out / "chat_template.jinja").write_text(_SHELL)
    assert run_cli("export", out, file, "--type", "f32", "-q") == 0
    shutil.rmtree(out)
    return ("run", file, "--chat", "--prompt", "x", "--max-new", 2)


def _parquet(place: Place) -> Command:
    """Values of a type that older readers of parquet unpickled."""
    import pyarrow
    from pyarrow import parquet

    kind = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb()),
    }
    text = [pyarrow.field(n, pyarrow.string(), metadata=kind) for n in ("prompt", "answer")]
    rows = [["Say yes. " * 20], ["yes"]]
    path = place.beside / "rows.parquet"
    parquet.write_table(pyarrow.table(rows, schema=pyarrow.schema(text)), path)
    return (*_calibrate(place), "--data", path)


CASES: tuple[Case, ...] = (
    *(
        case(f"source: code in every place, {title}", _source, run, status=0)
        for title, run in (
            ("inspected", _inspect),
            ("measured", _calibrate),
            ("converted and proved", _convert),
            ("evaluated", _evaluate),
        )
    ),
    *(
        case(f"checkpoint: code in every place, {title}", _checkpoint, *command, status=status)
        for title, command, status in (
            ("run", ("run", "--prompt", "x", "--max-new", 2), 0),
            ("proved", ("verify",), 1),
            ("evaluated", ("evaluate",), 2),
            ("with another budget", ("retarget", "--layers", "2"), 0),
            ("pushed", ("push", "a/b", "--no-verify"), 2),
        )
    ),
    *(
        case(f"tokenizer: its class is {name}", _class, name, family="gemma")
        for name in ("AutoModelForCausalLM", "pipeline")
    ),
    case("GGUF: a chat template that runs a command", _gguf, family="qwen3"),
    case("data: parquet of a type that was once unpickled", _parquet, status=0),
)
