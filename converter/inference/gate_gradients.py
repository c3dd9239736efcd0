"""What every layer's full attention would change, to first order, from one pass forward and back.

A layer's attention is written as sliding + weight * (full - sliding). At weight 0 the derivative of
a loss by the weight is attribution patching of the restore-one score; averaged over weights from 0
to 1, which all layers share, the derivatives sum to the whole difference between all full and all
sliding (integrated gradients, arXiv 1703.01365).

The loss is the answer's NLL, or how far what the output head reads is from what it reads in the
full-attention model: after the last norm, where DuoAttention (arXiv 2410.10819) compares too.

The way forward keeps each layer's input, the way back runs the layer again: memory grows by one
hidden state a layer, not by a layer's activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from converter.inference.attention import Attention, gated_attention
from converter.inference.branches import KeysAndValues, LayerRunner, cut, join
from converter.inference.embed_and_head import EmbedAndHead, answer_nll
from converter.inference.example import Example
from converter.inference.positions import LayerTypes, check_prompt, first_rows, token_spans
from converter.inference.waiting import ActivationStore
from converter.model.mask import FULL, LINEAR, SLIDING, Mask

# For each layer, lowest first, one weight, or one for each of its KV heads.
Gates = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class GateGradients:
    """One answer's loss, in nats per token or as a mean square, and its slope by each weight."""

    loss: float
    by_gate: Gates

    @property
    def slopes(self) -> tuple[float, ...]:
        """The derivative by every gate, those of the lowest layer first."""
        return tuple(slope for row in self.by_gate for slope in row)


def gate_layer_types(weights: Gates) -> LayerTypes:
    """How far each layer looks: as far as a sliding one where all its gates are 0."""
    return tuple(FULL if any(row) else SLIDING for row in weights)


class GateGradientPass:
    """One example's way forward through all layers and back again.

    Each layer's input waits for the way back in the store, under names that begin with `name`.
    """

    def __init__(
        self,
        ends: EmbedAndHead,
        example: Example,
        mask: Mask,
        weights: Gates,
        store: ActivationStore,
        name: str,
    ) -> None:
        check_prompt(example, mask)
        self._ends = ends
        self._example = example
        self._spans = token_spans(example, mask, kinds=ends.kinds)
        # Where a plan changes nothing there is no gate.
        rows = iter(weights)
        self._weights = [next(rows) if kind == FULL else None for kind in ends.kinds]
        self._hidden, arguments = ends.inputs(example)
        self._runner = LayerRunner(ends, arguments)
        # What a layer is given is kept from the first row on that a gradient reaches; below it the
        # keys are enough. Common rows are the same whatever the gates are: no gradient passes them.
        self._firsts = first_rows(gate_layer_types(weights), self._spans, mask)
        self._store = store
        self._name = name
        self._by_gate: Gates = ()

    def forward(self, layer: Any, index: int, *, returning: bool) -> None:
        """Take all rows through one layer; above the last one only the answer's matter.

        What the layer is given is kept when the way leads back.
        """
        first, kind = self._firsts[index], self._ends.kinds[index]
        if kind == LINEAR:
            # In two parts: the state between them is the way back's beginning.
            attention = self._ends.attention(kind)
            begin, end = self._hidden.tensor_split([first], dim=1)
            below, state = self._runner.run(layer, index, attention, begin, 0, None)
            output, _ = self._runner.run(layer, index, attention, end, first, state)
            output, (key, value) = torch.cat([below, output], dim=1), state
            if index + 1 == len(self._weights):
                output = output[:, self._spans.answer :]
        else:
            output, keys = self._attended(layer, index)
            key, value = cut(keys, 0, first)
        if returning:
            kept = {"hidden": self._hidden[:, first:], "key": key, "value": value}
            self._store.put(f"{self._name}-{index}", kept, {})
        self._hidden = output

    def _attended(self, layer: Any, index: int) -> tuple[torch.Tensor, KeysAndValues]:
        """A layer's output for all rows that are needed, and its keys and values of every row."""
        row = self._weights[index]
        if row is None:
            attention = self._ends.attention(self._ends.kinds[index])
        elif set(row) in ({0.0}, {1.0}):
            attention = self._ends.attention(FULL if row[0] else SLIDING)
        else:
            attention = self._gated(self._hidden.new_tensor(row))
        after = self._spans.answer if index + 1 == len(self._weights) else 0
        below = self._runner.keys(layer, index, self._hidden[:, :after], 0) if after else None
        rows = self._hidden[:, after:]
        output, keys = self._runner.run(layer, index, attention, rows, after, below)
        return output, keys if below is None else join(below, keys)

    def _gated(self, gate: torch.Tensor) -> Attention:
        return gated_attention(self._ends.attention(FULL), self._ends.attention(SLIDING), gate)

    def states(self) -> torch.Tensor:
        """Above all layers: (rows that predict the answer, hidden) that the output head reads."""
        return self._ends.last_hidden(self._hidden)[0]

    def start_backward(self, target: torch.Tensor | None) -> None:
        """From the hidden states above all layers to the loss and its gradient there.

        The target is the full-attention model's `states`, or None for the answer's NLL.
        """
        with torch.enable_grad():
            hidden = self._hidden.detach().requires_grad_()
            if target is None:
                loss = answer_nll(self._ends.logits(hidden)[0], self._example)
            else:
                found = self._ends.last_hidden(hidden)[0]
                exact = torch.promote_types(found.dtype, torch.float32)
                loss = (found.to(exact) - target.to(exact)).square().mean()
            (self._gradient,) = torch.autograd.grad(loss, hidden)
        self._loss = float(loss)

    def backward(self, layer: Any, index: int) -> float:
        """From a layer's output gradient to its inputs'; what that cost, in layer-forwards."""
        end, first, name = self._spans.end, self._firsts[index], f"{self._name}-{index}"
        after = end - self._gradient.shape[1]
        kept, _ = self._store.get(name)
        self._store.drop(name)
        with torch.enable_grad():
            hidden = kept["hidden"].detach().requires_grad_()
            past, weights = [(kept["key"], kept["value"])], self._weights[index]
            gates = [] if weights is None else [hidden.new_tensor(weights).requires_grad_()]
            kind = self._ends.kinds[index]
            attention = self._gated(*gates) if gates else self._ends.attention(kind)
            begin = first if kind == LINEAR else after
            if first < begin:
                rows = hidden[:, : begin - first]
                past.append(self._runner.keys(layer, index, rows, first))
            rows = hidden[:, begin - first :]
            output, _ = self._runner.run(layer, index, attention, rows, begin, join(*past))
            output = output[:, after - begin :]
            above = self._gradient.to(output.device)
            self._gradient, *by_gate = torch.autograd.grad(output, (hidden, *gates), above)
        self._by_gate = (*(tuple(one.tolist()) for one in by_gate), *self._by_gate)
        return 2 * (end - begin) / end

    def gradients(self) -> GateGradients:
        """What the way forward and back has found."""
        return GateGradients(self._loss, self._by_gate)
