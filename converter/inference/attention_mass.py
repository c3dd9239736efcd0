"""One prompt on its way through the full-attention model, with what its last rows look at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from converter.inference.branches import LayerRunner
from converter.inference.embed_and_head import EmbedAndHead
from converter.inference.example import Example
from converter.model.mask import FULL, LINEAR


class AttentionMassPass:
    """Weighs the attention of the last prompt rows on the first and the last keys.

    Arguments are those of `ModelRunner.attention_mass`; `shares` are those of the layers so far.
    """

    def __init__(
        self, ends: EmbedAndHead, example: Example, *, sinks: int, recent: int, last: int
    ) -> None:
        self._ends = ends
        # The last token of an answer is never read: with one there is the prompt only.
        prompt = replace(example, answer=example.answer[:1])
        self._hidden, arguments = ends.inputs(prompt)
        self._runner = LayerRunner(ends, arguments)
        self._end = len(example.prompt) + len(example.answer) - 1
        self._rows = min(last, len(example.prompt))
        self._sinks, self._recent = sinks, recent
        self.shares: list[float] = []

    def run_layer(self, layer: Any, index: int) -> float:
        """Take the prompt through a layer, of the last one only the rows that are weighed.

        Returns what it cost, in layer-forwards.
        """
        hidden, first, past, kinds = self._hidden, 0, None, self._ends.kinds
        if index + 1 == len(kinds) and kinds[index] != LINEAR and self._rows < hidden.shape[1]:
            first = hidden.shape[1] - self._rows
            past = self._runner.keys(layer, index, hidden[:, :first], 0)
        attend = self._attend if kinds[index] == FULL else self._ends.attention(kinds[index])
        self._hidden, _ = self._runner.run(layer, index, attend, hidden[:, first:], first, past)
        return self._hidden.shape[1] / self._end

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        *states: Any,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """The checkpoint's full attention, noting the share of it on the keys that count."""
        exact = torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        last = key.shape[2]
        p = torch.arange(last, device=key.device)
        q = torch.arange(last - self._rows, last, device=key.device)[:, None]
        hidden = p > q
        # A key that is both first and last counts once.
        uncounted = hidden | ((p >= self._sinks) & (p <= q - self._recent))
        by_kv_head = query[0, :, -self._rows :].to(exact).chunk(key.shape[1])
        shares = []
        # A head at a time, so that little more than (rows, keys) is ever written down.
        for queries, keys in zip(by_kv_head, key[0], strict=True):
            scores = queries @ keys.to(exact).T * scale
            whole, counted = (
                scores.masked_fill(left_out, -torch.inf).logsumexp(dim=-1)
                for left_out in (hidden, uncounted)
            )
            shares.append((counted - whole).exp())
        self.shares.append(float(torch.stack(shares).mean()))
        attend = self._ends.attention(FULL)
        return attend(module, query, key, *states, scaling=scaling, **options)
