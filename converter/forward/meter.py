"""Answers of a model under many plans, whichever way its layers fit into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from converter.data import Example, fingerprint_of
from converter.forward.climb import Branch, Climb
from converter.forward.gradient import GateClimb, GateGradients, Gates
from converter.forward.layers import Layers, ResidentLayers
from converter.forward.memory import Spill
from converter.forward.rows import Kinds
from converter.forward.shell import Shell, answer_nll
from converter.mask import Mask

# Told how many layer-forwards have just been done.
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Answer:
    """How a plan answers one example.

    Attributes:
        nll: mean negative log-likelihood of the answer tokens, in nats per token.
        correct: whether every answer token is the most likely one.
    """

    nll: float
    correct: bool


class Meter:
    """Measures answers under any plans, sharing what the plans have in common.

    Args:
        shell: the model around the layers.
        layers: the layers.
        mask: what sliding layers see.
        batch_rows: at most so many rows run through a layer at once, if that leaves one branch.
        spill: where hidden states wait when layers are streamed; None for in memory.
        apart: run every branch by itself.

    Attributes:
        layers: how many layers the model has.
    """

    def __init__(
        self,
        shell: Shell,
        layers: Layers,
        mask: Mask,
        batch_rows: int,
        spill: Spill | None = None,
        *,
        apart: bool = False,
    ) -> None:
        self._shell = shell
        self._batch_rows = batch_rows
        self._apart = apart
        self._modules = layers
        self._spill = spill
        self.mask = mask
        self.layers = len(shell.config.layer_types)

    def one_by_one(self) -> Meter:
        """The same model, with every branch by itself: equal plans give equal floats."""
        return Meter(
            self._shell, self._modules, self.mask, self._batch_rows, self._spill, apart=True
        )

    def answers(
        self, examples: Sequence[Example], plans: Sequence[Kinds], advance: Advance
    ) -> list[list[Answer]]:
        """Every plan's answer to every example: a list for each example, in the plans' order.

        Args:
            examples: what to read.
            plans: the kind of every layer, for each plan.
            advance: told how many layer-forwards have been done.
        """
        with torch.inference_mode():
            if isinstance(self._modules, ResidentLayers):
                modules = self._modules.modules
                return [
                    self._depth_first(self._climb(example, plans, keep=True), modules, advance)
                    for example in examples
                ]
            if self._spill is None:
                return self._breadth_first(examples, plans, advance)
            return self._breadth_first_spilled(self._spill, examples, plans, advance)

    def _climb(self, example: Example, plans: Sequence[Kinds], *, keep: bool = False) -> Climb:
        return Climb(
            self._shell,
            example,
            plans,
            self.mask,
            batch_rows=self._batch_rows,
            keep=keep,
            apart=self._apart,
        )

    def _depth_first(self, climb: Climb, modules: Sequence[Any], advance: Advance) -> list[Answer]:
        """Take a few branches to the top while the others wait, so that few are held at a time."""
        answers: dict[int, Answer] = {}

        def ascend(branches: list[Branch], index: int) -> None:
            while index < len(modules):
                branches = self._advance(climb, modules[index], index, branches, advance)
                index += 1
                if len(branches) > climb.widest:
                    # The branch that will fork most goes last: nothing waits for it then.
                    branches.sort(key=lambda branch: len(branch.plans))
                    while len(branches) > climb.widest:
                        ascend(branches[: climb.widest], index)
                        del branches[: climb.widest]
            answers.update(self._answers_of(climb, branches))

        ascend([climb.start()], 0)
        return _in_order(answers)

    def _breadth_first(
        self, examples: Sequence[Example], plans: Sequence[Kinds], advance: Advance
    ) -> list[list[Answer]]:
        """Take all branches of all examples through a layer before the next one is read."""
        climbs = [self._climb(example, plans) for example in examples]
        branches = [[climb.start()] for climb in climbs]
        for index, layer in self._modules.visit(range(self.layers)):
            for place, climb in enumerate(climbs):
                branches[place] = self._advance(climb, layer, index, branches[place], advance)
        return [
            _in_order(self._answers_of(climb, tops))
            for climb, tops in zip(climbs, branches, strict=True)
        ]

    def _breadth_first_spilled(
        self,
        spill: Spill,
        examples: Sequence[Example],
        plans: Sequence[Kinds],
        advance: Advance,
    ) -> list[list[Answer]]:
        """The same with one example in memory; it goes on where a killed run left its states."""
        plans_hash = hashlib.sha256(json.dumps(plans).encode()).hexdigest()
        names = _names(examples, f"states-{plans_hash[:16]}")
        notes = [spill.note(name) for name in names]
        levels = [0 if note is None else int(note["layer"]) for note in notes]
        answers: list[list[Answer]] = [[] for _ in examples]
        for index, layer in self._modules.visit(range(min(levels), self.layers)):
            for place, (example, name) in enumerate(zip(examples, names, strict=True)):
                if levels[place] > index:
                    continue
                climb = self._climb(example, plans)
                if index == 0:
                    branches = [climb.start()]
                else:
                    branches = climb.restore(*spill.get(name, self._shell.device))
                branches = self._advance(climb, layer, index, branches, advance)
                tensors, note = climb.state(branches)
                spill.put(name, tensors, note | {"layer": str(index + 1)})
        for place, (example, name) in enumerate(zip(examples, names, strict=True)):
            climb = self._climb(example, plans)
            branches = climb.restore(*spill.get(name, self._shell.device))
            answers[place] = _in_order(self._answers_of(climb, branches))
        for name in names:
            spill.drop(name)
        return answers

    def _advance(
        self,
        climb: Climb,
        layer: Any,
        index: int,
        branches: Sequence[Branch],
        advance: Advance,
    ) -> list[Branch]:
        before = climb.rows_run
        advanced = climb.advance(layer, index, branches)
        advance((climb.rows_run - before) / climb.extent.end)
        return advanced

    def _answers_of(self, climb: Climb, branches: Sequence[Branch]) -> dict[int, Answer]:
        """The answers of branches at the top, by the plans' places."""
        answers: dict[int, Answer] = {}
        for branch in branches:
            logits = self._shell.logits(branch.hidden)[0]
            nll = float(answer_nll(logits, climb.example))
            best = logits.argmax(dim=-1).tolist() == list(climb.example.answer)
            answers |= {place: Answer(nll, best) for place in branch.plans}
        return answers

    def gate_gradients(
        self,
        examples: Sequence[Example],
        weights: Gates,
        advance: Advance,
        targets: Sequence[torch.Tensor] | None = None,
    ) -> list[GateGradients]:
        """The derivative of every example's loss by every gate.

        Args:
            examples: what to read.
            weights: of the gates: 0 slides, 1 attends fully.
            advance: told how many layer-forwards have been done; a backward run counts as one.
            targets: what `full_states` gave for each example, for the mean squared difference from
                it; None for the answer's NLL.
        """
        total = self.layers
        with torch.no_grad():
            climbs = self._ascended(examples, weights, advance, returning=True)
            for place, climb in enumerate(climbs):
                climb.turn(None if targets is None else targets[place])
            for index, layer in self._modules.visit(range(total)[::-1]):
                for climb in climbs:
                    advance(climb.descend(layer, index))
        return [climb.gradients() for climb in climbs]

    def full_states(self, examples: Sequence[Example], advance: Advance) -> list[torch.Tensor]:
        """What the output head reads in the full-attention model where it predicts the answers.

        Computed as `gate_gradients` computes it at weights of 1, so that the difference there is 0.

        Args:
            examples: what to read.
            advance: told how many layer-forwards have been done.

        Returns:
            (answer tokens, hidden) for each example.
        """
        weights = ((1.0,),) * self.layers
        with torch.no_grad():
            climbs = self._ascended(examples, weights, advance, returning=False)
            return [climb.states() for climb in climbs]

    def _ascended(
        self, examples: Sequence[Example], weights: Gates, advance: Advance, *, returning: bool
    ) -> list[GateClimb]:
        """Take every example to the top, all through a layer before the next one is read."""
        climbs = [
            GateClimb(self._shell, example, self.mask, weights, self._spill, name)
            for example, name in zip(examples, _names(examples, "gradient"), strict=True)
        ]
        for index, layer in self._modules.visit(range(self.layers)):
            for climb in climbs:
                climb.ascend(layer, index, last=index == self.layers - 1, returning=returning)
                advance(1)
        return climbs


def _in_order(answers: Mapping[int, Answer]) -> list[Answer]:
    return [answers[place] for place in range(len(answers))]


def _names(examples: Sequence[Example], states: str) -> list[str]:
    """What the examples' states of some sort are called on disk; equal examples are numbered."""
    hashes = [fingerprint_of([example])[:16] for example in examples]
    return [f"{states}-{name}-{hashes[:i].count(name)}" for i, name in enumerate(hashes)]
