"""A model's tensors, read from its files and never mapped.

Where a mapped file becomes shorter, the process dies by a signal (SIGBUS) at the next use of a
tensor; a file that is read gives an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.common.errors import SourceError
from converter.model.source import Source

if TYPE_CHECKING:
    import torch


def read_tensors(
    source: Source, names: Collection[str], device: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Some tensors of a source, by name, on a device and in a dtype.

    Those that the family's class never holds in less are in float32 at least.

    Raises:
        SourceError: a file is not the one that was opened, or cannot be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    exact, wide = torch.promote_types(dtype, torch.float32), source.family.float32_tensors
    by_file: dict[Any, list[str]] = {}
    for name in names:
        by_file.setdefault(source.weights.tensors[name].path, []).append(name)
    tensors = {}
    for path, inside in by_file.items():
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                for name in inside:
                    its = exact if name.endswith(wide) else dtype
                    tensors[name] = file.get_tensor(name).to(device=device, dtype=its)
        except (SafetensorError, OSError) as error:
            source.files.check()
            raise SourceError(
                "a weight file cannot be read",
                where=path,
                got=error,
                next_step="check the disk, or download the model again",
            ) from error
    return tensors


def read_layer(
    source: Source, index: int, device: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The parameters of one layer by their names in transformers' class for it.

    Raises:
        SourceError: as `read_tensors`.
    """
    layers = source.family.layers
    # Old checkpoints hold more than the parameters, such as rotary frequencies.
    names = {suffix: f"{layers}{index}.{suffix}" for suffix in source.layer_tensors(index)}
    held = {suffix: name for suffix, name in names.items() if name in source.weights.tensors}
    found = read_tensors(source, list(held.values()), device, dtype)
    return source.family.pack_layer({suffix: found[name] for suffix, name in held.items()})


def with_first_layers(source: Source, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A configuration of the source, or of its checkpoint, with so many layers."""
    kinds = source.family.language(config).get("layer_types")
    changed: dict[str, Any] = {} if kinds is None else {"layer_types": kinds[:layers]}
    for key, of_layers in source.family.per_layer(source.language, source.shape).items():
        changed[key] = {layer: said for layer, said in of_layers.items() if layer < layers}
    return source.family.with_language(config, num_hidden_layers=layers, **changed)


def tell_all_layers(source: Source, decoder: Any, layer_types: list[str]) -> None:
    """Have the configuration of a model of the first layers speak of all of them.

    Args:
        source: the whole model.
        decoder: the language model without its head, of transformers' class.
        layer_types: what the configuration is to say, where it says such a thing.
    """
    config = decoder.config
    config.num_hidden_layers = source.shape.layers
    if hasattr(config, "layer_types"):
        config.layer_types = layer_types
    for key, of_layers in source.family.per_layer(source.language, source.shape).items():
        setattr(config, key, of_layers)
    # Some keep where layers begin that share their keys: behind the last one.
    if hasattr(decoder, "first_kv_shared_layer_idx"):
        decoder.first_kv_shared_layer_idx = source.shape.layers


def names_around_layers(source: Source, layers: int) -> list[str]:
    """Names of the tensors around the layers, and in so many of the first."""
    every = source.family.layers
    first = tuple(f"{every}{layer}." for layer in range(layers))
    return [n for n in source.weights.tensors if n.startswith(first) or not n.startswith(every)]


def build_model(
    source: Source,
    folder: Path,
    dtype: torch.dtype,
    names: Collection[str] | None = None,
    *,
    trust_remote_code: bool,
    **options: Any,
) -> Any:
    """A causal model as `from_pretrained` gives it, on the CPU, that maps no file.

    Args:
        source: whose weights.
        folder: what is loaded beside them: the configurations, and the code that these name.
        dtype: of the model.
        names: of the tensors to take; None for all.
        trust_remote_code: run Python files of the folder.
        options: of `from_pretrained`.

    Raises:
        SourceError: as `read_tensors`.
    """
    import torch
    import transformers

    # The class of all models brings torch's compiler, which torch 2.7 cannot import under a device.
    from transformers import AutoConfig, GenerationConfig, PreTrainedModel

    trust: Any = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
    with torch.device("meta"):
        automatic = getattr(transformers, source.family.auto_class)
        its_class: type[PreTrainedModel] = type(automatic.from_config(config, **trust))
    wanted = source.weights.tensors.keys() if names is None else names
    state = read_tensors(source, wanted, "cpu", dtype)
    model = its_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    source.files.check()
    return model
