"""How far plans' predictions are from those of the full-attention model."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

import torch
from torch.nn.functional import kl_div

from converter.inference.branches import Branch
from converter.inference.embed_and_head import EmbedAndHead

# So many rows go through the output head at once: with a vocabulary of 150 000 their logits are
# 77 MB in float32.
_HEAD_ROWS = 128


class Divergence:
    """Holds the branches of one example against that of the leader, which is the first to come.

    The sums over the branches' rows are divided by `rows`.
    """

    _expected: torch.Tensor

    def __init__(self, ends: EmbedAndHead, rows: int, leader: int) -> None:
        self._ends = ends
        self._rows = rows
        self._leader = leader

    def read(self, branches: Sequence[Branch]) -> dict[int, float]:
        """KL(leader || plan) of the next token in nats, by the plans' indices, above all layers."""
        for branch in branches:
            if self._leader in branch.plans:
                self._expected = branch.hidden
        parts: list[list[float]] = [[] for _ in branches]
        # The vocabulary is wide: few rows at a time, and the leader's once for all branches.
        for begin in range(0, self._expected.shape[1], _HEAD_ROWS):
            rows = slice(begin, begin + _HEAD_ROWS)
            expected = self._log_probabilities(self._expected[:, rows])
            for branch, sums in zip(branches, parts, strict=True):
                if self._leader not in branch.plans:
                    found = self._log_probabilities(branch.hidden[:, rows])
                    each = kl_div(found, expected, reduction="none", log_target=True)
                    sums += each.sum(dim=-1).tolist()
        return {
            plan: fsum(sums) / self._rows
            for branch, sums in zip(branches, parts, strict=True)
            for plan in branch.plans
        }

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) at least in float32, from (1, rows, hidden) in any type."""
        logits = self._ends.logits(hidden)[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
