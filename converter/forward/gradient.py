"""What every layer's full attention would change, to first order, from one walk up and one down.

A layer's attention is written as sliding + weight * (full - sliding); the derivative of the
answer's loss by the weight says what a little full attention in that layer does. At weight 0 that
is attribution patching of the restore-one score; averaged over weights from 0 to 1, which all
layers share, the derivatives sum to the whole difference between all full and all sliding
(integrated gradients, arXiv 1703.01365).

The walk up keeps each layer's input, the walk down runs the layer again: memory grows by one hidden
state a layer, not by a layer's activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from converter.data import Example
from converter.forward.attention import Gate, attending, gating
from converter.forward.climb import KeysAndValues, LayerRunner, cut, join
from converter.forward.memory import Spill
from converter.forward.rows import check_prompt, extent_of, first_rows
from converter.forward.shell import Shell, answer_nll
from converter.mask import FULL, SLIDING, Mask


@dataclass(frozen=True)
class GateGradients:
    """Derivatives of one answer's loss.

    Attributes:
        nll: the loss at the gates' common weight, nats per token.
        by_layer: its derivative by each layer's gate.
    """

    nll: float
    by_layer: tuple[float, ...]


class GateClimb:
    """One example's way up all layers and down again.

    Args:
        shell: the model around the layers.
        example: what to read.
        mask: what sliding layers see.
        weight: of every gate.
        spill: where each layer's input waits for the way down; None for in memory.
        name: what it is called there.
    """

    def __init__(
        self,
        shell: Shell,
        example: Example,
        mask: Mask,
        weight: float,
        spill: Spill | None,
        name: str,
    ) -> None:
        check_prompt(example, mask)
        self._shell = shell
        self._example = example
        self._extent = extent_of(example, mask)
        self._weight = weight
        self._runner = LayerRunner(shell, example)
        self._hidden = self._runner.take_embeddings()
        # What a layer is given is kept from the first row on that a gradient reaches; below it the
        # keys are enough. Common rows are the same whatever the gates are: no gradient passes them.
        kinds = (SLIDING if weight == 0 else FULL,) * len(shell.config.layer_types)
        self._firsts = first_rows(kinds, self._extent, mask)
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self._spill = spill
        self._name = name
        self._gradient: torch.Tensor
        self._nll = 0.0
        self._derivatives: dict[int, float] = {}

    def ascend(self, layer: Any, index: int, *, last: bool) -> None:
        """Take all rows through one layer; above the last one only the answer's matter."""
        after = self._extent.answer if last else 0
        if self._weight == 0:
            with attending(self._shell.config, SLIDING):
                output, keys = self._run(layer, after)
        else:
            with gating(self._shell.config):
                gate = Gate(self._hidden.new_tensor(self._weight), self._shell.attention)
                output, keys = self._run(layer, after, gate=gate)
        first = self._firsts[index]
        key, value = cut(keys, 0, first)
        kept = {"hidden": self._hidden[:, first:], "key": key, "value": value}
        if self._spill is None:
            self._kept[index] = kept
        else:
            self._spill.put(f"{self._name}-{index}", kept, {})
        self._hidden = output

    def _run(self, layer: Any, after: int, **more: Any) -> tuple[torch.Tensor, KeysAndValues]:
        """All rows in, those from `after` on out; and the keys of all rows."""
        hidden = self._hidden
        if after == 0:
            return self._runner.run(layer, hidden, 0, None, **more)
        past = self._runner.keys(layer, hidden[:, :after], 0)
        output, keys = self._runner.run(layer, hidden[:, after:], after, past, **more)
        return output, join(past, keys)

    def turn(self) -> None:
        """From the hidden states at the top to the loss and its gradient there."""
        with torch.enable_grad():
            hidden = self._hidden.detach().requires_grad_()
            nll = answer_nll(self._shell.logits(hidden)[0], self._example)
            (self._gradient,) = torch.autograd.grad(nll, hidden)
        self._nll = float(nll)

    def descend(self, layer: Any, index: int) -> float:
        """From the gradient at a layer's output to that at its input, and by its gate.

        Returns:
            What it cost, in layer-forwards.
        """
        end = self._extent.end
        after = end - self._gradient.shape[1]
        first = self._firsts[index]
        kept = self._take_kept(index)
        with gating(self._shell.config), torch.enable_grad():
            hidden = kept["hidden"].detach().requires_grad_()
            weight = hidden.new_tensor(self._weight).requires_grad_()
            past = [(kept["key"], kept["value"])]
            if first < after:
                past.append(self._runner.keys(layer, hidden[:, : after - first], first))
            output, _ = self._runner.run(
                layer,
                hidden[:, after - first :],
                after,
                join(*past),
                gate=Gate(weight, self._shell.attention),
            )
            self._gradient, by_weight = torch.autograd.grad(
                output, (hidden, weight), self._gradient
            )
        self._derivatives[index] = float(by_weight)
        return 2 * (end - after) / end

    def _take_kept(self, index: int) -> dict[str, torch.Tensor]:
        if self._spill is None:
            return self._kept.pop(index)
        name = f"{self._name}-{index}"
        kept, _ = self._spill.get(name, self._gradient.device)
        self._spill.drop(name)
        return kept

    def gradients(self) -> GateGradients:
        """What the way up and down has found."""
        ordered = tuple(self._derivatives[index] for index in range(len(self._derivatives)))
        return GateGradients(self._nll, ordered)
