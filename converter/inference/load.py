"""Loading: a source with the attention of its checkpoint, as calibration runs it; a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint.format import format_of_plan, render_config
from converter.checkpoint.private import private_hybrid, runnable
from converter.checkpoint.reader import stale_code
from converter.common.devices import SPREAD, automatic_device, automatic_dtype
from converter.common.errors import CheckpointError, SourceError, UsageError, refusing
from converter.common.files import write_json
from converter.common.progress import quiet_libraries
from converter.inference.memory import DISK, HOST, MemoryPlan
from converter.model.mask import Mask
from converter.model.source import Source
from converter.model.tensors import build_model, names_around_layers, with_first_layers
from converter.plan.plan import Plan, layer_types_of

if TYPE_CHECKING:
    from converter.inference.runner import ModelRunner

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where a model runs: on a torch device or `spread`, and in which torch dtype."""

    device: str
    dtype: str


def resolve_placement(device: str, dtype: str, *, may_spread: bool = False) -> Placement:
    """Turn `auto` into what suits this machine: a GPU that works, in half precision.

    Raises:
        UsageError: the device does not exist here, or a package that it needs.
    """
    import torch

    spread = device == SPREAD and may_spread
    if spread or device == "auto":
        device = automatic_device()
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            "this device cannot be used",
            where="--device",
            got=f"{device}: {str(error).splitlines()[0]}",
            expected="cpu, cuda or cuda:0, mps" + (f", or {SPREAD}" if may_spread else ""),
        ) from error
    if dtype == "auto":
        dtype = automatic_dtype(device)
    return Placement(SPREAD if spread else device, dtype)


def load_runner(
    source: Source, mask: Mask, placement: Placement, memory_plan: MemoryPlan, offload_folder: Path
) -> ModelRunner:
    """What runs the source on examples; hidden states wait in the folder, if on disk."""
    import torch

    from converter.inference import waiting
    from converter.inference.embed_and_head import EmbedAndHead
    from converter.inference.layers import ResidentLayers, StreamedLayers
    from converter.inference.runner import ModelRunner

    model = load_model(source, mask, placement, whole=not memory_plan.streamed)
    if not memory_plan.streamed:
        resident = ResidentLayers(model.get_decoder().layers)
        ends = EmbedAndHead(model)
        return ModelRunner(ends, resident, mask, memory_plan.batch_rows)
    streamed = StreamedLayers(source, model, placement.device, getattr(torch, placement.dtype))
    ends, store = EmbedAndHead(model), waiting.ActivationStore()
    if memory_plan.waiting == HOST:
        store = waiting.HostStore(model.device)
    elif memory_plan.waiting == DISK:
        store = waiting.ActivationOffload(offload_folder, model.device)
    return ModelRunner(
        ends, streamed, mask, memory_plan.batch_rows, store, plans_together=memory_plan.plans
    )


def load_model(source: Source, mask: Mask, placement: Placement, *, whole: bool = True) -> Any:
    """Load the source through the very files a checkpoint would hold, all layers sliding.

    Where not the whole model is wanted, but what stands around the layers, only the first of them
    are loaded: as many as have one of every kind.
    """
    quiet_libraries()
    types = layer_types_of((), source.shape.layers, source.shape.kinds)
    plan = Plan(types, mask, "measurement", None, None, source.name, None)
    started, few = time.perf_counter(), source.shape.first_of_every_kind
    with private_hybrid(source, plan) as folder:
        if not whole:
            config = render_config(source, plan)
            write_json(folder / "config.json", with_first_layers(source, config, few))
        names = list(source.weights.tensors) if whole else names_around_layers(source, few)
        options = source.family.load_exactly if placement.dtype == "float64" else {}
        with refusing("the model cannot be loaded", source.folder, SourceError, folder):
            # The code is what we have just rendered, not the source's.
            model = load_folder(folder, source, placement, trust=True, names=names, **options)
    _log.info("loaded the model in %.1f s", time.perf_counter() - started)
    return model.eval().requires_grad_(False)


def load_folder(
    folder: Path,
    source: Source,
    placement: Placement,
    *,
    trust: bool,
    names: Collection[str] | None = None,
    **options: Any,
) -> Any:
    """A model from a folder of files that may be used, with weights of a source, where it runs.

    Args:
        folder: what is loaded beside the weights.
        source: whose weights.
        placement: where the model runs.
        trust: run Python files of the folder.
        names: of the tensors that a CPU takes; None for all.
        options: of `from_pretrained`.

    Raises:
        SourceError: the weights are not those that were opened, or cannot be read.
    """
    import torch
    import transformers

    dtype = getattr(torch, placement.dtype)
    if placement.device == "cpu":
        return build_model(source, folder, dtype, names, trust_remote_code=trust, **options)
    # Mapped, tensors go to a GPU one by one: the memory of the machine may be smaller.
    model = getattr(transformers, source.family.auto_class).from_pretrained(
        folder,
        dtype=dtype,
        device_map="auto" if placement.device == SPREAD else placement.device,
        trust_remote_code=trust,
        local_files_only=True,
        **options,
    )
    source.files.check()
    return model


def load_checkpoint(
    folder: Path,
    source: Source,
    plan: Plan,
    placement: Placement,
    *,
    trust: bool,
    switches_plans: bool = False,
    full_attention_layers: int | None = None,
    profile: str | None = None,
) -> Any:
    """A checkpoint in transformers, through the code of this version, or its own where trusted.

    Args:
        folder, source, plan, placement: the checkpoint as `open_checkpoint` finds it, and where.
        trust: run the checkpoint's own Python files.
        switches_plans: the model is to be able to, which a native class is not.
        full_attention_layers, profile: the plan to run instead, as `RunSettings` has it.

    Raises:
        CheckpointError: its code is needed and is not this version's, or config.json is damaged.
        UsageError: the plan asked for does not exist.
    """
    quiet_libraries()
    asked = {"full_attention_layers": full_attention_layers, "profile": profile}
    choice: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    # What this version renders stands for the checkpoint's code only where the two are equal.
    with_code = trust or not (stale := stale_code(folder, source, plan))
    needs_code = switches_plans or bool(choice) or not format_of_plan(source, plan).native
    if needs_code and not with_code:
        raise CheckpointError(
            "the checkpoint's Python files are not this version's, and they are needed",
            where=folder,
            got=", ".join(stale),
            next_step="replace them with: hybridize retarget; or read them, then pass "
            "--trust-remote-code to run them",
        )
    with (
        runnable(folder, source, plan, trust=trust) as own,
        refusing("the checkpoint cannot be loaded", folder, CheckpointError, own),
    ):
        try:
            model = load_folder(own, source, placement, trust=with_code, **choice)
        except ValueError as error:
            if not choice:
                raise
            raise UsageError("the plan asked for cannot be used", got=error) from error
    return model.eval()
