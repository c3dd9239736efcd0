"""Loading a model in the way that a schedule says."""

from __future__ import annotations

from pathlib import Path

from converter.inference.embed_and_head import EmbedAndHead
from converter.inference.layers import ResidentLayers, StreamedLayers
from converter.inference.load import Placement, load_model
from converter.inference.memory import ActivationOffload, MemoryPlan
from converter.inference.runner import ModelRunner
from converter.model.mask import Mask
from converter.model.source import Source


def load_runner(
    source: Source, mask: Mask, placement: Placement, memory_plan: MemoryPlan, spill_folder: Path
) -> ModelRunner:
    """A meter on the source.

    Args:
        source: the model.
        mask: what sliding layers see.
        placement: device and dtype.
        memory_plan: which layers are loaded when.
        spill_folder: where hidden states wait, when the schedule says on disk.
    """
    import torch

    model = load_model(source, mask, placement, whole=not memory_plan.streamed)
    if not memory_plan.streamed:
        layers = ResidentLayers(model.get_decoder().layers)
        return ModelRunner(EmbedAndHead(model, model.config), layers, mask, memory_plan.batch_rows)
    dtype: torch.dtype = getattr(torch, placement.dtype)
    streamed = StreamedLayers(source, model, placement.device, dtype)
    offload = ActivationOffload(spill_folder) if memory_plan.offloaded else None
    return ModelRunner(
        EmbedAndHead(model, streamed.config), streamed, mask, memory_plan.batch_rows, offload
    )
