"""Loading a model in the way that a schedule says."""

from __future__ import annotations

from pathlib import Path

from converter.inference.embed_and_head import Shell
from converter.inference.layers import ResidentLayers, StreamedLayers
from converter.inference.load import Placement, load_model
from converter.inference.memory import Schedule, Spill
from converter.inference.runner import Meter
from converter.model.mask import Mask
from converter.model.source import Source


def load_meter(
    source: Source, mask: Mask, placement: Placement, schedule: Schedule, spill_folder: Path
) -> Meter:
    """A meter on the source.

    Args:
        source: the model.
        mask: what sliding layers see.
        placement: device and dtype.
        schedule: which layers are loaded when.
        spill_folder: where hidden states wait, when the schedule says on disk.
    """
    import torch

    model = load_model(source, mask, placement, whole=not schedule.streamed)
    if not schedule.streamed:
        layers = ResidentLayers(model.get_decoder().layers)
        return Meter(Shell(model, model.config), layers, mask, schedule.batch_rows)
    dtype: torch.dtype = getattr(torch, placement.dtype)
    streamed = StreamedLayers(source, model, placement.device, dtype)
    spill = Spill(spill_folder) if schedule.spilled else None
    return Meter(Shell(model, streamed.config), streamed, mask, schedule.batch_rows, spill)
