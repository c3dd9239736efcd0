"""Answers of a model under many plans, whichever way its layers fit into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from converter.inference.attention_mass import AttentionMassPass
from converter.inference.branches import Branch, SharedForward
from converter.inference.embed_and_head import HEAD_ROWS, EmbedAndHead, answer_nll
from converter.inference.example import Example
from converter.inference.gate_gradients import GateGradientPass, GateGradients, Gates
from converter.inference.kl import Divergence
from converter.inference.layers import Layers, ResidentLayers
from converter.inference.memory import ActivationOffload
from converter.inference.positions import LayerTypes
from converter.model.mask import FULL, Mask

# Told how many layer-forwards have just been done.
Advance = Callable[[float], None]

T = TypeVar("T")


@dataclass(frozen=True)
class _Reading(Generic[T]):
    """What is wanted at the top of a walk.

    Attributes:
        plans: the kind of every layer, for each plan.
        reader: makes of one example's climb a function that turns branches at the top into their
            plans' results, by the plans' places; it is called with some branches at a time.
        every_row: whether all rows go to the top that plans can differ in, not only the answer's.
        leader: a plan that gets to the top before the others, or with the first of them.
    """

    plans: Sequence[LayerTypes]
    reader: Callable[[SharedForward], Callable[[Sequence[Branch]], Mapping[int, T]]]
    every_row: bool = False
    leader: int | None = None


@dataclass(frozen=True)
class Answer:
    """How a plan answers one example.

    Attributes:
        nll: mean negative log-likelihood of the answer tokens, in nats per token.
        correct: whether every answer token is the most likely one.
    """

    nll: float
    correct: bool


class ModelRunner:
    """Measures answers under any plans, sharing what the plans have in common.

    Args:
        ends: the model around the layers.
        layers: the layers.
        mask: what sliding layers see.
        batch_rows: at most so many rows run through a layer at once, if that leaves one branch.
        offload: where hidden states wait when layers are streamed; None for in memory.
        apart: run every branch by itself.

    Attributes:
        layers: how many layers the model has.
    """

    def __init__(
        self,
        ends: EmbedAndHead,
        layers: Layers,
        mask: Mask,
        batch_rows: int,
        offload: ActivationOffload | None = None,
        *,
        unbatched: bool = False,
    ) -> None:
        self._ends = ends
        self._batch_rows = batch_rows
        self._unbatched = unbatched
        self._modules = layers
        self._offload = offload
        self.mask = mask
        self.layers = len(ends.config.layer_types)

    def one_by_one(self) -> ModelRunner:
        """The same model, with every branch by itself: equal plans give equal floats."""
        return ModelRunner(
            self._ends, self._modules, self.mask, self._batch_rows, self._offload, unbatched=True
        )

    def answers(
        self, examples: Sequence[Example], plans: Sequence[LayerTypes], advance: Advance
    ) -> list[list[Answer]]:
        """Every plan's answer to every example: a list for each example, in the plans' order.

        Args:
            examples: what to read.
            plans: the kind of every layer, for each plan.
            advance: told how many layer-forwards have been done.
        """

        def reader(forward: SharedForward) -> Callable[[Sequence[Branch]], dict[int, Answer]]:
            return lambda branches: {
                place: answer
                for branch in branches
                for answer in self.answers_of_states(forward.example, branch.hidden)
                for place in branch.plans
            }

        return self._walk(examples, _Reading(plans, reader), advance)

    def answer_states(
        self, examples: Sequence[Example], plans: Sequence[LayerTypes], advance: Advance
    ) -> list[list[torch.Tensor]]:
        """What the last layer gives for the rows that predict the answer, under every plan.

        Args:
            examples: what to read.
            plans: the kind of every layer, for each plan.
            advance: told how many layer-forwards have been done.

        Returns:
            (answer tokens, hidden) before the last norm: a list for each example, in the plans'
            order. Equal plans share theirs.
        """

        def reader(_climb: SharedForward) -> Callable[[Sequence[Branch]], dict[int, torch.Tensor]]:
            return lambda branches: {
                place: branch.hidden[0] for branch in branches for place in branch.plans
            }

        return self._walk(examples, _Reading(plans, reader), advance)

    def answers_of_states(self, example: Example, states: torch.Tensor) -> list[Answer]:
        """The answers that the output head gives for states such as `answer_states` finds.

        Args:
            example: whose answer.
            states: (states, answer tokens, hidden).
        """
        answers = []
        with torch.inference_mode():
            together = max(1, HEAD_ROWS // len(example.answer))
            for begin in range(0, len(states), together):
                for logits in self._ends.logits(states[begin : begin + together]):
                    correct = logits.argmax(dim=-1).tolist() == list(example.answer)
                    answers.append(Answer(float(answer_nll(logits, example)), correct))
        return answers

    def divergences(
        self,
        examples: Sequence[Example],
        plans: Sequence[LayerTypes],
        advance: Advance,
        *,
        every_row: bool,
    ) -> list[list[float]]:
        """How far every plan's predictions are from the full-attention model's.

        KL(full attention || plan) of the next token, in nats, meaned over the rows that predict
        answer tokens, or over all rows (KL-guided selection, arXiv 2512.20569).

        Args:
            examples: what to read.
            plans: the kind of every layer, for each plan.
            advance: told how many layer-forwards have been done.
            every_row: over all rows; those that see everything under any plan count with 0.

        Returns:
            A list for each example, in the plans' order.
        """

        def reader(forward: SharedForward) -> Callable[[Sequence[Branch]], dict[int, float]]:
            spans = forward.spans
            rows = spans.end if every_row else spans.end - spans.answer
            return Divergence(self._ends, rows, leader=0).read

        with_full = [(FULL,) * self.layers, *plans]
        found = self._walk(examples, _Reading(with_full, reader, every_row, leader=0), advance)
        return [row[1:] for row in found]

    def attention_mass(
        self,
        examples: Sequence[Example],
        advance: Advance,
        *,
        sinks: int,
        recent: int,
        last: int,
    ) -> list[list[float]]:
        """The share of attention that stays near, for every layer of the full-attention model.

        LightTransfer's lazy ratio (arXiv 2410.13846), meaned over heads and prompt rows.

        Args:
            examples: what to read; only their prompts are.
            advance: told how many layer-forwards have been done.
            sinks: the first so many keys count,
            recent: and the last so many that a row sees, its own included.
            last: of so many rows at the end of the prompt, or of all where it is shorter.

        Returns:
            0 to 1: a list for each example, lowest layer first.
        """
        with torch.inference_mode():
            climbs = [
                AttentionMassPass(self._ends, example, sinks=sinks, recent=recent, last=last)
                for example in examples
            ]
            for index, layer in self._modules.visit(range(self.layers)):
                for forward in climbs:
                    advance(forward.ascend(layer, last=index == self.layers - 1))
        return [forward.shares for forward in climbs]

    def _walk(
        self, examples: Sequence[Example], reading: _Reading[T], advance: Advance
    ) -> list[list[T]]:
        """Every plan's result for every example: a list for each example, in the plans' order."""
        with torch.inference_mode():
            if isinstance(self._modules, ResidentLayers):
                modules = self._modules.modules
                return [
                    self._depth_first(example, reading, modules, advance) for example in examples
                ]
            if self._offload is None:
                return self._breadth_first(examples, reading, advance)
            return self._breadth_first_spilled(self._offload, examples, reading, advance)

    def _climb(
        self, example: Example, reading: _Reading[T], *, keep: bool = False
    ) -> SharedForward:
        return SharedForward(
            self._ends,
            example,
            reading.plans,
            self.mask,
            batch_rows=self._batch_rows,
            keep=keep,
            unbatched=self._unbatched,
            every_row=reading.every_row,
        )

    def _depth_first(
        self,
        example: Example,
        reading: _Reading[T],
        modules: Sequence[Any],
        advance: Advance,
    ) -> list[T]:
        """Take a few branches to the top while the others wait, so that few are held at a time."""
        forward = self._climb(example, reading, keep=True)
        read = reading.reader(forward)
        results: dict[int, T] = {}

        def turn(branch: Branch) -> tuple[bool, int]:
            # The branch that will fork most goes last: nothing waits for it then.
            return reading.leader not in branch.plans, len(branch.plans)

        def ascend(branches: list[Branch], index: int) -> None:
            while index < len(modules):
                branches = self._advance(forward, modules[index], index, branches, advance)
                index += 1
                if len(branches) > forward.widest:
                    branches.sort(key=turn)
                    while len(branches) > forward.widest:
                        ascend(branches[: forward.widest], index)
                        del branches[: forward.widest]
            results.update(read(branches))

        ascend([forward.start()], 0)
        return _in_order(results)

    def _breadth_first(
        self, examples: Sequence[Example], reading: _Reading[T], advance: Advance
    ) -> list[list[T]]:
        """Take all branches of all examples through a layer before the next one is read."""
        climbs = [self._climb(example, reading) for example in examples]
        branches = [[forward.start()] for forward in climbs]
        for index, layer in self._modules.visit(range(self.layers)):
            for place, forward in enumerate(climbs):
                branches[place] = self._advance(forward, layer, index, branches[place], advance)
        return [
            _in_order(reading.reader(forward)(tops))
            for forward, tops in zip(climbs, branches, strict=True)
        ]

    def _breadth_first_spilled(
        self,
        offload: ActivationOffload,
        examples: Sequence[Example],
        reading: _Reading[T],
        advance: Advance,
    ) -> list[list[T]]:
        """The same with one example in memory; it goes on where a killed run left its states."""
        walk = json.dumps([reading.plans, reading.every_row])
        names = _names(examples, f"states-{hashlib.sha256(walk.encode()).hexdigest()[:16]}")
        notes = [offload.note(name) for name in names]
        levels = [0 if note is None else int(note["layer"]) for note in notes]
        results = []
        for index, layer in self._modules.visit(range(min(levels), self.layers)):
            for place, (example, name) in enumerate(zip(examples, names, strict=True)):
                if levels[place] > index:
                    continue
                forward = self._climb(example, reading)
                if index == 0:
                    branches = [forward.start()]
                else:
                    branches = forward.restore(*offload.get(name, self._ends.device))
                branches = self._advance(forward, layer, index, branches, advance)
                tensors, note = forward.state(branches)
                offload.put(name, tensors, note | {"layer": str(index + 1)})
        for example, name in zip(examples, names, strict=True):
            forward = self._climb(example, reading)
            branches = forward.restore(*offload.get(name, self._ends.device))
            results.append(_in_order(reading.reader(forward)(branches)))
        for name in names:
            offload.drop(name)
        return results

    def _advance(
        self,
        forward: SharedForward,
        layer: Any,
        index: int,
        branches: Sequence[Branch],
        advance: Advance,
    ) -> list[Branch]:
        before = forward.rows_run
        advanced = forward.advance(layer, index, branches)
        advance((forward.rows_run - before) / forward.spans.end)
        return advanced

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
            for place, forward in enumerate(climbs):
                forward.turn(None if targets is None else targets[place])
            for index, layer in self._modules.visit(range(total)[::-1]):
                for forward in climbs:
                    advance(forward.descend(layer, index))
        return [forward.gradients() for forward in climbs]

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
            return [forward.states() for forward in climbs]

    def _ascended(
        self, examples: Sequence[Example], weights: Gates, advance: Advance, *, returning: bool
    ) -> list[GateGradientPass]:
        """Take every example to the top, all through a layer before the next one is read."""
        climbs = [
            GateGradientPass(self._ends, example, self.mask, weights, self._offload, name)
            for example, name in zip(examples, _names(examples, "gradient"), strict=True)
        ]
        for index, layer in self._modules.visit(range(self.layers)):
            for forward in climbs:
                forward.ascend(layer, index, last=index == self.layers - 1, returning=returning)
                advance(1)
        return climbs


def _in_order(results: Mapping[int, T]) -> list[T]:
    return [results[place] for place in range(len(results))]


def _names(examples: Sequence[Example], states: str) -> list[str]:
    """What the examples' states of some sort are called on disk; equal examples are numbered."""
    hashes = [example.digest[:16] for example in examples]
    return [f"{states}-{name}-{hashes[:i].count(name)}" for i, name in enumerate(hashes)]
