"""What every layer's full attention would change, to first order, from one walk up and one down.

A layer's attention is written as sliding + weight * (full - sliding); the derivative of a loss by
the weight says what a little full attention in that layer does. At weight 0 that is attribution
patching of the restore-one score; averaged over weights from 0 to 1, which all layers share, the
derivatives sum to the whole difference between all full and all sliding (integrated gradients,
arXiv 1703.01365). Weights that differ between layers, or between the KV heads of a layer, can be
learned (see `converter.calibration.gates`).

The loss is the answer's NLL, or how far what the output head reads is from what it reads in the
full-attention model: after the last norm, where DuoAttention (arXiv 2410.10819) compares too.

The walk up keeps each layer's input, the walk down runs the layer again: memory grows by one hidden
state a layer, not by a layer's activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum
from typing import Any

import torch

from converter.inference.attention import Gate, attending, gating
from converter.inference.branches import KeysAndValues, LayerRunner, cut, join
from converter.inference.embed_and_head import EmbedAndHead, answer_nll
from converter.inference.example import Example
from converter.inference.memory import ActivationOffload
from converter.inference.positions import LayerTypes, check_prompt, first_rows, token_spans
from converter.model.mask import FULL, SLIDING, Mask

# For each layer, lowest first, one weight, or one for each of its KV heads.
Gates = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class GateGradients:
    """Derivatives of one answer's loss.

    Attributes:
        loss: at the gates' weights: nats per token, or the mean squared difference.
        by_gate: its derivative by each weight.
    """

    loss: float
    by_gate: Gates

    @property
    def by_layer(self) -> tuple[float, ...]:
        """The derivative by a weight that is added to all of a layer's."""
        return tuple(fsum(row) for row in self.by_gate)


def gate_kinds(weights: Gates) -> LayerTypes:
    """How far each layer looks: as far as a sliding one where all its gates are 0."""
    return tuple(FULL if any(row) else SLIDING for row in weights)


class GateGradientPass:
    """One example's way up all layers and down again.

    Args:
        ends: the model around the layers.
        example: what to read.
        mask: what sliding layers see.
        weights: of the gates.
        offload: where each layer's input waits for the way down; None for in memory.
        name: what it is called there.
    """

    def __init__(
        self,
        ends: EmbedAndHead,
        example: Example,
        mask: Mask,
        weights: Gates,
        offload: ActivationOffload | None,
        name: str,
    ) -> None:
        check_prompt(example, mask)
        self._ends = ends
        self._example = example
        self._spans = token_spans(example, mask)
        self._weights = weights
        self._runner = LayerRunner(ends, example)
        self._hidden = self._runner.take_embeddings()
        # What a layer is given is kept from the first row on that a gradient reaches; below it the
        # keys are enough. Common rows are the same whatever the gates are: no gradient passes them.
        self._firsts = first_rows(gate_kinds(weights), self._spans, mask)
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self._offload = offload
        self._name = name
        self._gradient: torch.Tensor
        self._loss = 0.0
        self._derivatives: dict[int, tuple[float, ...]] = {}

    def ascend(self, layer: Any, index: int, *, last: bool, returning: bool) -> None:
        """Take all rows through one layer; above the last one only the answer's matter.

        Args:
            layer: the layer.
            index: its place.
            last: whether none comes after it.
            returning: whether the way leads down again, and so what the layer is given is kept.
        """
        after = self._spans.answer if last else 0
        row = self._weights[index]
        if set(row) in ({0.0}, {1.0}):
            with attending(self._ends.config, FULL if row[0] else SLIDING):
                output, keys = self._run(layer, after)
        else:
            with gating(self._ends.config):
                gate = Gate(self._hidden.new_tensor(row), self._ends.attention)
                output, keys = self._run(layer, after, gate=gate)
        if returning:
            self._keep(index, keys)
        self._hidden = output

    def _keep(self, index: int, keys: KeysAndValues) -> None:
        """Keep what a layer is given until the way down."""
        first = self._firsts[index]
        key, value = cut(keys, 0, first)
        kept = {"hidden": self._hidden[:, first:], "key": key, "value": value}
        if self._offload is None:
            self._kept[index] = kept
        else:
            self._offload.put(f"{self._name}-{index}", kept, {})

    def _run(self, layer: Any, after: int, **more: Any) -> tuple[torch.Tensor, KeysAndValues]:
        """All rows in, those from `after` on out; and the keys of all rows."""
        hidden = self._hidden
        if after == 0:
            return self._runner.run(layer, hidden, 0, None, **more)
        past = self._runner.keys(layer, hidden[:, :after], 0)
        output, keys = self._runner.run(layer, hidden[:, after:], after, past, **more)
        return output, join(past, keys)

    def states(self) -> torch.Tensor:
        """At the top: (rows that predict the answer, hidden) that the output head reads."""
        return self._ends.last_hidden(self._hidden)[0]

    def turn(self, target: torch.Tensor | None) -> None:
        """From the hidden states at the top to the loss and its gradient there.

        Args:
            target: the full-attention model's `states`; None for the answer's NLL.
        """
        with torch.enable_grad():
            hidden = self._hidden.detach().requires_grad_()
            if target is None:
                loss = answer_nll(self._ends.logits(hidden)[0], self._example)
            else:
                loss = _mean_square(self._ends.last_hidden(hidden)[0], target)
            (self._gradient,) = torch.autograd.grad(loss, hidden)
        self._loss = float(loss)

    def descend(self, layer: Any, index: int) -> float:
        """From the gradient at a layer's output to that at its input, and by its gates.

        Returns:
            What it cost, in layer-forwards.
        """
        end = self._spans.end
        after = end - self._gradient.shape[1]
        first = self._firsts[index]
        kept = self._take_kept(index)
        with gating(self._ends.config), torch.enable_grad():
            hidden = kept["hidden"].detach().requires_grad_()
            weight = hidden.new_tensor(self._weights[index]).requires_grad_()
            past = [(kept["key"], kept["value"])]
            if first < after:
                past.append(self._runner.keys(layer, hidden[:, : after - first], first))
            output, _ = self._runner.run(
                layer,
                hidden[:, after - first :],
                after,
                join(*past),
                gate=Gate(weight, self._ends.attention),
            )
            self._gradient, by_weight = torch.autograd.grad(
                output, (hidden, weight), self._gradient
            )
        self._derivatives[index] = tuple(by_weight.tolist())
        return 2 * (end - after) / end

    def _take_kept(self, index: int) -> dict[str, torch.Tensor]:
        if self._offload is None:
            return self._kept.pop(index)
        name = f"{self._name}-{index}"
        kept, _ = self._offload.get(name, self._gradient.device)
        self._offload.drop(name)
        return kept

    def gradients(self) -> GateGradients:
        """What the way up and down has found."""
        ordered = tuple(self._derivatives[index] for index in range(len(self._derivatives)))
        return GateGradients(self._loss, ordered)


def _mean_square(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared difference, a scalar, at least in float32."""
    exact = torch.promote_types(found.dtype, torch.float32)
    return (found.to(exact) - wanted.to(exact)).square().mean()
