"""How long a proof takes, from one layer of the model timed on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from converter.checkpoint.verify.place import Place
from converter.checkpoint.verify.reference import Reference
from converter.checkpoint.verify.request import CANDIDATE_CALLS, CANDIDATE_PASSES, Probe
from converter.model.source import Source
from converter.model.tensors import read_layer
from converter.plan.plan import Plan

# What the reference computes over the whole text, or nearly: the plan for the text, with its front
# cut, and behind the prompt; the source itself.
_PLANNED_PASSES, _ORIGINAL_PASSES = 3, 1
# Multiplications of a proof that takes moments wherever it runs.
_MOMENTS = 10**12


def expected_seconds(
    source: Source, plan: Plan, probe: Probe, place: Place, candidates: int
) -> float | None:
    """What a proof will take here, about; None where that is not worth a measurement.

    Args:
        source, plan, probe, place: what is proved, and where.
        candidates: in how many codes the checkpoint is run.

    Raises:
        SourceError: weights cannot be read.
    """
    shape, tokens = source.shape, len(probe.ids)
    passes = _PLANNED_PASSES + _ORIGINAL_PASSES + CANDIDATE_PASSES * candidates
    per_token = source.family.weights_per_token(source.config, shape)
    if per_token * tokens * passes < _MOMENTS:
        return None
    reference, last = Reference(source, place, plan, layers=1), [tokens - 1]
    # Whatever happens at the first call only.
    reference.original(probe.ids[:64], [0])
    planned = _seconds(lambda: reference.planned(probe.ids, last, probe.prompt_tokens))
    original = _seconds(lambda: reference.original(probe.ids, last))
    layer = _PLANNED_PASSES * planned
    layer += (_ORIGINAL_PASSES + CANDIDATE_PASSES * candidates) * original
    if place.in_turn:
        dtype = getattr(torch, place.dtype)
        reading = _seconds(lambda: read_layer(source, 0, place.device, dtype))
        layer += (_PLANNED_PASSES + _ORIGINAL_PASSES + CANDIDATE_CALLS * candidates) * reading
    return shape.layers * layer


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
