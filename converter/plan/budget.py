"""How many layers or KV heads keep full attention: a count, a share, cache memory or loss."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

from converter.common.errors import PlanError, UsageError
from converter.common.units import human_bytes, parse_bytes
from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask
from converter.plan.plan import cache_bytes
from converter.plan.units import Units

_SPELLINGS = (
    "a count such as 9, a fraction such as 1/4, 0.25 or 25%, a KV cache such as kv:2GiB@128k, "
    "or a loss such as nll:0.05"
)
_CONTEXT_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True)
class Budget(ABC):
    """What a user is willing to spend on full attention.

    Attributes:
        text: as the user wrote it; `1/4` says more than `7` in a plan, a card or a report.
    """

    text: str

    @abstractmethod
    def count(self, units: Units, shape: ModelDimensions, mask: Mask) -> int:
        """How many units of a model keep full attention while the others have this mask.

        Raises:
            PlanError: the model cannot meet the budget.
        """

    def tokens(self, shape: ModelDimensions) -> int:
        """The context at which to count the cache: as long as the model can, unless it was said."""
        return shape.context_tokens

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class CountBudget(Budget):
    """A number of layers, or of KV heads.

    Attributes:
        amount: a count of them, or a share above 0 and at most 1.
    """

    amount: int | Fraction

    def count(self, units: Units, shape: ModelDimensions, mask: Mask) -> int:  # noqa: ARG002
        """The count; a fraction is rounded up, to at least 1."""
        if isinstance(self.amount, Fraction):
            return max(1, math.ceil(self.amount * units.total))
        if self.amount > units.total:
            raise PlanError(
                f"the budget asks for more full-attention {units} than the model has",
                where="--budget",
                expected=f"0 to {units.total}",
                got=self.amount,
            )
        return self.amount


@dataclass(frozen=True)
class KvBudget(Budget):
    """The memory of one sequence's keys and values.

    Attributes:
        limit_bytes: what they may take, at the checkpoint's own dtype.
        context_tokens: the sequence's length; None for as long as the model can.
    """

    limit_bytes: int
    context_tokens: int | None

    def count(self, units: Units, shape: ModelDimensions, mask: Mask) -> int:
        """The largest number of full units whose cache stays within the limit."""
        tokens = self.tokens(shape)
        layers = (Fraction(count, units.per_layer) for count in range(units.total + 1))
        sizes = [cache_bytes(full, mask, shape, tokens) for full in layers]
        fitting = [count for count, size in enumerate(sizes) if size <= self.limit_bytes]
        if fitting:
            return fitting[-1]
        problem = "the KV cache is above the budget even when every layer slides"
        next_step = "allow more, or choose a smaller --window"
        if mask.full_attention_decode:
            problem = "with full attention in decode every layer keeps its whole KV cache"
            next_step = "leave out --full-decode, or give the budget in layers"
        raise PlanError(
            problem,
            where="--budget",
            expected=f"at least kv:{sizes[0]}B ({human_bytes(sizes[0])}) at {tokens:,} tokens",
            got=self.text,
            next_step=next_step,
        )

    def tokens(self, shape: ModelDimensions) -> int:
        """The context that the limit is meant for.

        Raises:
            PlanError: the model was not made for so long a context.
        """
        if self.context_tokens is None:
            return shape.context_tokens
        if self.context_tokens > shape.context_tokens:
            raise PlanError(
                "the budget's context is longer than the model's",
                where="--budget",
                expected=f"at most {shape.context_tokens} tokens",
                got=f"{self.context_tokens} ({self.text})",
            )
        return self.context_tokens


@dataclass(frozen=True)
class NllBudget(Budget):
    """A loss: as few full layers as stay within it, which only measuring can tell.

    Attributes:
        bound: how far the answer NLL may lie above the original's, in nats per token; 0 or more.
    """

    bound: float

    def count(self, units: Units, shape: ModelDimensions, mask: Mask) -> int:  # noqa: ARG002
        """Refused: no number follows from sizes alone."""
        raise PlanError(
            "a budget of loss says how many layers only once plans have been measured",
            where="--budget",
            expected="a number of layers or a KV cache, such as 1/4 or kv:2GiB@128k",
            got=self.text,
        )


def parse_budget(text: str) -> Budget:
    """Read `9`, `1/4`, `0.25`, `25%`, `kv:2GiB@128k` or `nll:0.05`.

    Raises:
        PlanError: the text is none of these, or the amount is out of range.
    """
    text = text.strip()
    kind, colon, amount = text.partition(":")
    if colon and kind == "kv":
        return _kv_budget(text, amount)
    if colon and kind == "nll":
        try:
            bound = float(amount)
        except ValueError as error:
            raise _unreadable(text) from error
        if not 0 <= bound < math.inf:
            raise _out_of_range(text, "a finite loss of at least 0 nats per answer token")
        return NllBudget(text, bound)
    # Python refuses to read thousands of digits, and nobody means them.
    if re.fullmatch(r"\d{1,99}", text):
        return CountBudget(text, int(text))
    percent = re.fullmatch(r"(\d{1,99}(?:\.\d{1,99})?)%", text)
    if percent or re.fullmatch(r"\d{1,99}/[1-9]\d{0,98}|\d{0,99}\.\d{1,99}", text):
        fraction = Fraction(percent[1]) / 100 if percent else Fraction(text)
        if 0 < fraction <= 1:
            return CountBudget(text, fraction)
        raise _out_of_range(text, "a fraction above 0 and at most 1")
    raise _unreadable(text)


def _kv_budget(text: str, amount: str) -> KvBudget:
    size, at, context = amount.partition("@")
    try:
        limit = parse_bytes(size)
    except UsageError as error:
        raise _unreadable(text) from error
    if not at:
        return KvBudget(text, limit, None)
    match = re.fullmatch(r"(\d{1,15})([kKmM]?)", context.strip())
    if match is None:
        raise _unreadable(text)
    tokens = int(match[1]) * _CONTEXT_UNITS[match[2].lower()]
    if tokens < 1:
        raise _out_of_range(text, "a context of at least 1 token")
    return KvBudget(text, limit, tokens)


def _unreadable(text: str) -> PlanError:
    return PlanError(
        "the budget cannot be read", where="--budget", expected=_SPELLINGS, got=repr(text)
    )


def _out_of_range(text: str, expected: str) -> PlanError:
    return PlanError("the budget is out of range", where="--budget", expected=expected, got=text)
