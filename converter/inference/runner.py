"""Answers of a model under many plans, whichever way its layers fit into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from converter.inference.attention_mass import AttentionMassPass
from converter.inference.branches import Branch, SharedForward
from converter.inference.embed_and_head import EmbedAndHead, answer_nll
from converter.inference.example import Example
from converter.inference.gate_gradients import GateGradientPass, GateGradients, Gates
from converter.inference.kl import Divergence
from converter.inference.layers import Layers, ResidentLayers
from converter.inference.positions import LayerTypes, in_groups
from converter.inference.waiting import ActivationStore
from converter.model.mask import FULL, Mask

# Told how many layer-forwards have just been done.
Advance = Callable[[float], None]

T = TypeVar("T")


@dataclass(frozen=True)
class _Request(Generic[T]):
    """What is wanted of plans."""

    plans: Sequence[LayerTypes]
    # Makes of one example's forward pass a function that turns branches above all layers into
    # their plans' results, by the plans' indices; it is given some branches at a time.
    reader: Callable[[SharedForward], Callable[[Sequence[Branch]], Mapping[int, T]]]
    every_row: bool = False
    # A plan that gets to the top before the others, or with the first of them.
    leader: int | None = None

    def parts(self, count: int) -> Iterator[_Request[T]]:
        """The same of so many plans at a time, each time with the leader, which is the first."""
        led = [] if self.leader is None else [self.plans[0]]
        rest = self.plans[len(led) :]
        for begin in range(0, max(1, len(rest)), count):
            yield replace(self, plans=[*led, *rest[begin : begin + count]])


@dataclass(frozen=True)
class Answer:
    """How a plan answers one example: mean NLL in nats per token; whether all tokens are right."""

    nll: float
    correct: bool


class ModelRunner:
    """Runs a model on examples under any plans, sharing what the plans have in common.

    Args:
        ends, layers: the model.
        mask: what sliding layers see.
        batch_rows: at most so many rows run through a layer at once, if that leaves one branch.
        store: where hidden states wait when layers are streamed; None for where they are.
        unbatched: run every branch by itself.
        plans_together: at most so many plans run together when layers are streamed; None for all.

    Attributes:
        layers: how many layers plans are about: those that attend fully in the model itself.
        depth: how many layers the model has.
    """

    def __init__(
        self,
        ends: EmbedAndHead,
        layers: Layers,
        mask: Mask,
        batch_rows: int,
        store: ActivationStore | None = None,
        *,
        unbatched: bool = False,
        plans_together: int | None = None,
    ) -> None:
        self._ends = ends
        self._batch_rows = batch_rows
        self._plans_together = plans_together
        self._unbatched = unbatched
        self._modules = layers
        self._store = store or ActivationStore()
        self.mask = mask
        self.depth = len(ends.kinds)
        self.layers = ends.kinds.count(FULL)

    def one_by_one(self) -> ModelRunner:
        """The same model, with every branch by itself: equal plans give equal floats."""
        return ModelRunner(
            self._ends,
            self._modules,
            self.mask,
            self._batch_rows,
            self._store,
            unbatched=True,
            plans_together=self._plans_together,
        )

    def answers(
        self, examples: Sequence[Example], plans: Sequence[LayerTypes], advance: Advance
    ) -> list[list[Answer]]:
        """Every plan's answer to every example: a list for each example, in the plans' order."""

        def answer(example: Example, branch: Branch) -> Answer:
            logits = self._ends.logits(branch.hidden)[0]
            correct = logits.argmax(dim=-1).tolist() == list(example.answer)
            return Answer(float(answer_nll(logits, example)), correct)

        def reader(forward: SharedForward) -> Callable[[Sequence[Branch]], dict[int, Answer]]:
            return lambda branches: {
                plan: found
                for branch in branches
                for found in [answer(forward.example, branch)]
                for plan in branch.plans
            }

        return self._under_plans(examples, _Request(plans, reader), advance)

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

        A list for each example, in the plans' order. Over every row, those that see everything
        under any plan count with 0.
        """

        def reader(forward: SharedForward) -> Callable[[Sequence[Branch]], dict[int, float]]:
            spans = forward.spans
            rows = spans.end if every_row else spans.end - spans.answer
            return Divergence(self._ends, rows, leader=0).read

        request = _Request([(FULL,) * self.layers, *plans], reader, every_row, leader=0)
        return [row[1:] for row in self._under_plans(examples, request, advance)]

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
            examples: only their prompts are read.
            sinks: the first so many keys count,
            recent: and the last so many that a row sees, its own included.
            last: of so many rows at the end of the prompt, or of all where it is shorter.

        Returns:
            0 to 1: a list for each example, lowest layer first.
        """
        with torch.inference_mode():
            passes = [
                AttentionMassPass(self._ends, example, sinks=sinks, recent=recent, last=last)
                for example in examples
            ]
            for index, layer in self._modules.visit(range(self.depth)):
                for forward in passes:
                    advance(forward.run_layer(layer, index))
        return [forward.shares for forward in passes]

    def gate_gradients(
        self,
        examples: Sequence[Example],
        weights: Gates,
        advance: Advance,
        targets: Sequence[torch.Tensor] | None = None,
    ) -> list[GateGradients]:
        """The derivative of every example's loss by every gate.

        Args:
            weights: of the gates: 0 slides, 1 attends fully.
            advance: told of progress; a backward run counts as one layer-forward.
            targets: what `full_states` gave for each example; None for the answer's NLL.
        """
        with torch.no_grad():
            passes = self._gate_passes(examples, weights, advance, returning=True)
            for i, gate_pass in enumerate(passes):
                gate_pass.start_backward(None if targets is None else targets[i])
            for index, layer in self._modules.visit(range(self.depth)[::-1]):
                for gate_pass in passes:
                    advance(gate_pass.backward(layer, index))
        return [gate_pass.gradients() for gate_pass in passes]

    def full_states(self, examples: Sequence[Example], advance: Advance) -> list[torch.Tensor]:
        """What the output head reads in the full-attention model where it predicts the answers.

        (answer tokens, hidden) for each example, computed as `gate_gradients` does at weights of 1,
        so that the difference there is 0.
        """
        weights = ((1.0,),) * self.layers
        with torch.no_grad():
            passes = self._gate_passes(examples, weights, advance, returning=False)
            return [gate_pass.states() for gate_pass in passes]

    def _gate_passes(
        self, examples: Sequence[Example], weights: Gates, advance: Advance, *, returning: bool
    ) -> list[GateGradientPass]:
        """Take every example through all layers, all through one before the next one is read."""
        passes = [
            GateGradientPass(self._ends, example, self.mask, weights, self._store, name)
            for example, name in zip(examples, _names(examples, "gradient"), strict=True)
        ]
        for index, layer in self._modules.visit(range(self.depth)):
            for gate_pass in passes:
                gate_pass.forward(layer, index, returning=returning)
                advance(1)
        return passes

    def _under_plans(
        self, examples: Sequence[Example], request: _Request[T], advance: Advance
    ) -> list[list[T]]:
        """Every plan's result for every example: a list for each example, in the plans' order."""
        with torch.inference_mode():
            if isinstance(self._modules, ResidentLayers):
                modules = self._modules.modules
                return [self._depth_first(e, request, modules, advance) for e in examples]
            parts = request.parts(self._plans_together or len(request.plans))
            every = [self._breadth_first(examples, part, advance) for part in parts]
        # The leader is every part's first, and wanted once.
        led = request.leader is not None
        first, *others = every
        for more in others:
            for row, further in zip(first, more, strict=True):
                row += further[led:]
        return first

    def _shared_forward(
        self, example: Example, request: _Request[T], *, keep: bool = False
    ) -> SharedForward:
        return SharedForward(
            self._ends,
            example,
            request.plans,
            self.mask,
            batch_rows=self._batch_rows,
            keep=keep,
            unbatched=self._unbatched,
            every_row=request.every_row,
        )

    def _depth_first(
        self, example: Example, request: _Request[T], modules: Sequence[Any], advance: Advance
    ) -> list[T]:
        """Take a few branches to the top while the others wait, so that few are held at a time."""
        forward = self._shared_forward(example, request, keep=True)
        read = request.reader(forward)
        results: dict[int, T] = {}
        # Branches with the layer that comes next; those on top go first.
        waiting = [(0, [forward.start()])]
        while waiting:
            index, branches = waiting.pop()
            if index == len(modules):
                results.update(read(branches))
                continue
            branches = _run_layer(forward, modules[index], index, branches, advance)
            groups = in_groups(branches, forward.batch_branches, request.leader)
            waiting += [(index + 1, group) for group in reversed(groups)]
        return [results[i] for i in sorted(results)]

    def _breadth_first(
        self, examples: Sequence[Example], request: _Request[T], advance: Advance
    ) -> list[list[T]]:
        """Take all branches of all examples through a layer before the next one is read.

        States that wait on disk are taken up where a killed run has left them.
        """
        store = self._store
        asked = json.dumps([request.plans, request.every_row])
        names = _names(examples, f"states-{hashlib.sha256(asked.encode()).hexdigest()[:16]}")
        done = [int((store.note(name) or {"layer": "0"})["layer"]) for name in names]
        for index, layer in self._modules.visit(range(min(done, default=self.depth), self.depth)):
            for example, name, known in zip(examples, names, done, strict=True):
                if known <= index:
                    forward = self._shared_forward(example, request)
                    below = forward.restore(*store.get(name)) if index else [forward.start()]
                    above = _run_layer(forward, layer, index, below, advance)
                    tensors, note = forward.state(above)
                    store.put(name, tensors, note | {"layer": str(index + 1)})
        results = []
        for example, name in zip(examples, names, strict=True):
            forward = self._shared_forward(example, request)
            found = request.reader(forward)(forward.restore(*store.get(name)))
            results.append([found[i] for i in sorted(found)])
        for name in names:
            store.drop(name)
        return results


def _run_layer(
    forward: SharedForward, layer: Any, index: int, branches: Sequence[Branch], advance: Advance
) -> list[Branch]:
    before = forward.rows_run
    above = forward.run_layer(layer, index, branches)
    advance((forward.rows_run - before) / forward.spans.end)
    return above


def _names(examples: Sequence[Example], states: str) -> list[str]:
    """What the examples' states of some sort are called; equal examples are numbered."""
    hashes = [example.digest[:16] for example in examples]
    return [f"{states}-{name}-{hashes[:i].count(name)}" for i, name in enumerate(hashes)]
