"""A model's tensors, read from its files and never mapped.

Where a mapped file becomes shorter, the process dies by a signal (SIGBUS) at the next use of a
tensor; a file that is read gives an error.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from converter.common.errors import SourceError
from converter.model.source import Source

if TYPE_CHECKING:
    import torch


def read_tensors(
    source: Source, names: Collection[str], device: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Some tensors of a source, by name, on a device and in a dtype.

    Raises:
        SourceError: a file is not the one that was opened, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[Any, list[str]] = {}
    for name in names:
        by_file.setdefault(source.weights.tensors[name].path, []).append(name)
    tensors = {}
    for path, inside in by_file.items():
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                for name in inside:
                    tensors[name] = file.get_tensor(name).to(device=device, dtype=dtype)
        except (SafetensorError, OSError) as error:
            source.files.check()
            raise SourceError(
                "a weight file cannot be read",
                where=path,
                got=error,
                next_step="check the disk, or download the model again",
            ) from error
    return tensors


def build_model(
    source: Source, config: Any, names: Collection[str], dtype: torch.dtype, **options: Any
) -> Any:
    """A causal model of a config's class with tensors of a source, on the CPU.

    Code that the config names is run: it must be what this version renders.

    Args:
        source: whose weights.
        config: a configuration of transformers.
        names: which of its tensors.
        dtype: of the model.
        options: of `from_pretrained`.

    Raises:
        SourceError: as `read_tensors`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        its_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=True))
    state = read_tensors(source, names, "cpu", dtype)
    model = its_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    source.files.check()
    return model
