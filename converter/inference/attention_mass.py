"""One prompt on its way up the full-attention model, with what its last rows look at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from converter.inference.attention import Weighing, weighing_attention
from converter.inference.branches import LayerRunner
from converter.inference.embed_and_head import EmbedAndHead
from converter.inference.example import Example


class AttentionMassPass:
    """Weighs the attention of the last prompt rows on the first and the last keys.

    Args:
        ends: the model around the layers.
        example: whose prompt to read.
        sinks: the first so many keys count,
        recent: and the last so many that a row sees, its own included.
        last: of so many rows at the end of the prompt, or of all where it is shorter.

    Attributes:
        shares: of the layers so far, from 0 to 1.
    """

    def __init__(
        self, ends: EmbedAndHead, example: Example, *, sinks: int, recent: int, last: int
    ) -> None:
        self._config = ends.config
        # The last token of an answer is never read: with one there is the prompt only.
        self._runner = LayerRunner(ends, replace(example, answer=example.answer[:1]))
        self._hidden = self._runner.take_embeddings()
        self._end = len(example.prompt) + len(example.answer) - 1
        self.shares: list[float] = []
        self._weighing = Weighing(
            rows=min(last, len(example.prompt)),
            sinks=sinks,
            recent=recent,
            attention=ends.attention,
            tell=self.shares.append,
        )

    def ascend(self, layer: Any, *, last: bool) -> float:
        """Take the prompt through one layer; of the last one only the weighed rows are wanted.

        Returns:
            What it cost, in layer-forwards.
        """
        hidden, first, past = self._hidden, 0, None
        if last and self._weighing.rows < hidden.shape[1]:
            first = hidden.shape[1] - self._weighing.rows
            past = self._runner.keys(layer, hidden[:, :first], 0)
        with weighing_attention(self._config):
            self._hidden, _ = self._runner.run(
                layer, hidden[:, first:], first, past, weighing=self._weighing
            )
        return self._hidden.shape[1] / self._end
