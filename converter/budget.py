"""How many layers may keep full attention."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from converter.errors import PlanError

_SPELLINGS = "a count such as 9, or a fraction such as 1/4 or 0.25"


@dataclass(frozen=True)
class Budget:
    """A number of layers that keep full attention.

    Attributes:
        text: as the user wrote it; `1/4` says more than `7` in a plan, a card or a report.
        amount: a count of layers, or a share of them.
    """

    text: str
    amount: int | Fraction

    def layers(self, total: int) -> int:
        """Full-attention layers out of `total`; a fraction is rounded up, to at least 1.

        Raises:
            PlanError: the count is larger than the number of layers.
        """
        if isinstance(self.amount, Fraction):
            return max(1, math.ceil(self.amount * total))
        if self.amount > total:
            raise PlanError(
                "the budget asks for more full-attention layers than the model has",
                where="--budget",
                expected=f"0 to {total}",
                got=self.amount,
            )
        return self.amount

    def __str__(self) -> str:
        return self.text


def parse_budget(text: str) -> Budget:
    """Read `9`, `1/4` or `0.25`.

    Raises:
        PlanError: the text is none of these, or a fraction outside 0 to 1.
    """
    text = text.strip()
    # Python refuses to read thousands of digits, and nobody means them.
    if re.fullmatch(r"\d{1,99}", text):
        return Budget(text, int(text))
    if re.fullmatch(r"\d{1,99}/[1-9]\d{0,98}|\d{0,99}\.\d{1,99}", text):
        fraction = Fraction(text)
        if 0 < fraction <= 1:
            return Budget(text, fraction)
        raise PlanError(
            "the budget is out of range",
            where="--budget",
            expected="a fraction above 0 and at most 1",
            got=text,
        )
    raise PlanError(
        "the budget cannot be read", where="--budget", expected=_SPELLINGS, got=repr(text)
    )
