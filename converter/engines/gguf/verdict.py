"""Whether llama.cpp would honour a hybrid, told from the source's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from converter.engines.gguf.architecture import OTHER_ENGINE, PLAIN_WINDOW, honouring, why_not_mask
from converter.engines.gguf.stock import extra_tensors, why_not
from converter.model.mask import Mask
from converter.model.source import Source


@dataclass(frozen=True)
class GgufForm:
    """What a GGUF of a checkpoint would be.

    Attributes:
        arch: the llama.cpp architecture that honours the plan; None when there is none.
        why_not: the reason for that; None when there is one.
        way_out: what to do about it.
    """

    arch: str | None
    why_not: str | None = None
    way_out: str | None = None


def gguf_form(source: Source, mask: Mask) -> GgufForm:
    """The form for a source under a mask."""
    stock, reason = source.family.stock_gguf, why_not(source)
    if stock is None or reason is not None:
        return GgufForm(None, reason, OTHER_ENGINE)
    keys = stock.metadata(source.config, source.shape)
    found = honouring(stock.arch, keys, extra_tensors(source.config))
    if isinstance(found, str):
        return GgufForm(None, found, OTHER_ENGINE)
    if reason := why_not_mask(mask):
        return GgufForm(None, reason, PLAIN_WINDOW)
    return GgufForm(found.arch)
