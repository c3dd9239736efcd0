"""The source with the attention of the checkpoint: what calibration measures is what ships."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from converter.checkpoint.format import render_config
from converter.checkpoint.writer import write_model
from converter.common.errors import UsageError
from converter.common.files import write_json
from converter.common.progress import quiet_libraries
from converter.model.mask import SLIDING, Mask
from converter.model.source import Source
from converter.plan.plan import Plan

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

# As a device: all GPUs there are, by transformers' own device_map.
SPREAD = "spread"


@dataclass(frozen=True)
class Placement:
    """Where a model runs.

    Attributes:
        device: a torch device such as `cpu` or `cuda:0`, or `spread`.
        dtype: the name of a torch dtype, out of `converter.settings.DTYPES` without `auto`.
    """

    device: str
    dtype: str


def resolve_placement(device: str, dtype: str, *, may_spread: bool = False) -> Placement:
    """Turn `auto` into what suits this machine: bfloat16 on a GPU, float32 on a CPU.

    Args:
        device: as the user wrote it.
        dtype: as the user wrote it.
        may_spread: whether the caller can run a model that is spread over devices.

    Raises:
        UsageError: the device does not exist here, or a package that it needs.
    """
    import torch

    if device == SPREAD and may_spread:
        return Placement(SPREAD, _spread_dtype(dtype))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            "this device cannot be used",
            where="--device",
            got=f"{device}: {str(error).splitlines()[0]}",
            expected="cpu, cuda or cuda:0" + (f", or {SPREAD}" if may_spread else ""),
        ) from error
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
    return Placement(device, dtype)


def _spread_dtype(dtype: str) -> str:
    import torch

    if find_spec("accelerate") is None:
        raise UsageError(
            "spreading a model over devices needs the accelerate package",
            where=f"--device {SPREAD}",
            next_step="pip install 'hybridize[spread]'",
        )
    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"


def load_model(source: Source, mask: Mask, placement: Placement, *, whole: bool = True) -> Any:
    """Load the source through the very files a checkpoint would hold, all layers sliding.

    The folder is temporary and only points at the weights.

    Args:
        source: the model.
        mask: what sliding layers see.
        placement: device and dtype.
        whole: load every layer; without it only the first, for what stands around the layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    plan = Plan(
        (SLIDING,) * source.shape.layers, mask, "measurement", None, None, source.name, None
    )
    started = time.perf_counter()
    with TemporaryDirectory(prefix="hybridize-") as temporary:
        # transformers names its copy of the code after the folder; a fixed name keeps it to one.
        folder = Path(temporary) / "hybridize_measurement"
        folder.mkdir()
        write_model(source, plan, folder, symlink=True)
        if not whole:
            config = render_config(source, plan)
            write_json(
                folder / "config.json",
                config | {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]},
            )
        dtype: torch.dtype = getattr(torch, placement.dtype)
        spread = placement.device == SPREAD
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map="auto" if spread else None,
            # The code is what `write_model` has just rendered, not the source's.
            trust_remote_code=True,
            local_files_only=True,
            **(source.family.load_exactly if dtype == torch.float64 else {}),
        )
    if not spread:
        # Not `device_map`, which needs the accelerate package.
        model.to(placement.device)
    _log.info("loaded the model in %.1f s", time.perf_counter() - started)
    return model.eval().requires_grad_(False)
