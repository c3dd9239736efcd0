"""One example on its way through the layers, under many plans at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from converter.inference.attention import Attention, calling_given_attention
from converter.inference.embed_and_head import EmbedAndHead
from converter.inference.example import Example
from converter.inference.positions import (
    NO_ATTENTION,
    LayerTypes,
    check_prompt,
    first_rows,
    token_spans,
)
from converter.model.mask import LINEAR, SLIDING, Mask

# (batch, kv_heads, rows, head_dim) keys and values.
KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class _KeysTaken(Exception):  # noqa: N818 - no error: the layer is left once its keys are known
    """Leaves a layer before its attention."""


class _KeyStore:
    """What a decoder layer takes for its cache: earlier keys in, the rows' own keys out."""

    own: KeysAndValues

    def __init__(self, past: KeysAndValues | None, *, leave: bool) -> None:
        self._past = [] if past is None else [past]
        self._leave = leave

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> KeysAndValues:
        # Called by the layer between its projections and its attention.
        self.own = key, value
        if self._leave:
            raise _KeysTaken
        return join(*self._past, self.own)


def join(*parts: KeysAndValues) -> KeysAndValues:
    """Keys and values one after the other; a batch of one is every batch's."""
    if len(parts) == 1:
        return parts[0]
    batch = max(key.shape[0] for key, _ in parts)
    keys, values = (
        [state.expand(batch, -1, -1, -1) for state in states] for states in zip(*parts, strict=True)
    )
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def cut(keys: KeysAndValues, begin: int, end: int) -> KeysAndValues:
    """Keys and values of some of the rows."""
    return keys[0][:, :, begin:end], keys[1][:, :, begin:end]


class _StateStore:
    """What a recurrent layer takes for its cache: the state so far in, the state after out.

    It is a pair: the last inputs of the convolution (batch, channels, its width), and the
    recurrent state. Nothing is written in place, so gradients pass.
    """

    own: KeysAndValues

    def __init__(self, past: KeysAndValues | None, batch: int) -> None:
        self._past = None if past is None else tuple(s.expand(batch, *s.shape[1:]) for s in past)

    def get_conv_state(self, *_: Any, **__: Any) -> torch.Tensor | None:
        return None if self._past is None else self._past[0]

    def get_recurrent_state(self, *_: Any, **__: Any) -> torch.Tensor | None:
        return None if self._past is None else self._past[1]

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        # Else a single row would be convolved in place.
        return True

    def update_conv_state(
        self, inputs: torch.Tensor, *_: Any, conv_kernel_size: int, **__: Any
    ) -> torch.Tensor:
        if self._past is not None:
            inputs = torch.cat([self._past[0], inputs], dim=-1)
        self._inputs = inputs[..., -conv_kernel_size:]
        return inputs

    def update_recurrent_state(self, state: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.own = self._inputs, state
        return state


class LayerRunner:
    """Runs single decoder layers on some rows of one example.

    The arguments are each layer's for all rows, beside their hidden states.
    """

    def __init__(self, ends: EmbedAndHead, arguments: Sequence[Mapping[str, Any]]) -> None:
        self._ends = ends
        self._given = arguments

    def run(
        self,
        layer: Any,
        index: int,
        attention: Attention,
        hidden: torch.Tensor,
        first: int,
        past: KeysAndValues | None,
    ) -> tuple[torch.Tensor, KeysAndValues]:
        """Run a decoder layer of transformers on consecutive rows.

        Args:
            layer: the layer, which is the one at this index,
            index: of the model.
            attention: how it attends; a recurrent layer does not.
            hidden: (batch, rows, hidden), what the layer below gave for them.
            first: the position of the first of them.
            past: keys and values of earlier rows, in the layout of the checkpoint's own cache; of a
                recurrent layer, its state after them.

        Returns:
            (batch, rows, hidden) and the rows' own keys and values, or the state after them.
        """
        if self._ends.kinds[index] == LINEAR:
            states = _StateStore(past, hidden.shape[0])
            given = self._arguments(index, hidden, first, states) | {"attention_mask": None}
            given.pop("prompt_length", None)
            return layer(hidden, **given), states.own
        store = _KeyStore(past, leave=False)
        arguments = self._arguments(index, hidden, first, store)
        with calling_given_attention(self._ends.config):
            output: torch.Tensor = layer(hidden, **arguments, given_attention=attention)
        return output, store.own

    def keys(self, layer: Any, index: int, hidden: torch.Tensor, first: int) -> KeysAndValues:
        """The keys and values that a layer makes of consecutive rows, and nothing more."""
        store = _KeyStore(None, leave=True)
        with suppress(_KeysTaken):
            layer(hidden, **self._arguments(index, hidden, first, store))
        return store.own

    def _arguments(
        self, index: int, hidden: torch.Tensor, first: int, store: _KeyStore | _StateStore
    ) -> dict[str, Any]:
        rows, given = slice(first, first + hidden.shape[1]), self._given[index]
        cosine, sine = given["position_embeddings"]
        return {
            **given,
            "attention_mask": self._ends.rows_from(first),
            "position_ids": given["position_ids"][:, rows],
            "position_embeddings": (cosine[:, rows], sine[:, rows]),
            "past_key_values": store,
            "use_cache": True,
        }


@dataclass(frozen=True)
class Branch:
    """Plans, by their indices in the list, that agree on all layers so far.

    The next layer's input is (1, rows, hidden), from row `first` to the last.
    """

    plans: tuple[int, ...]
    hidden: torch.Tensor
    first: int


@dataclass(frozen=True)
class _Fork:
    """A branch on its way through one layer, with the plans that give the layer this type."""

    layer_type: str
    branch: Branch
    # The first row that is needed above the layer.
    after: int


class SharedForward:
    """One example under several plans: shared while they agree, forked where they part.

    Args:
        ends, example, plans, mask: the model around the layers, and what `ModelRunner` is asked.
        batch_rows, unbatched: as `ModelRunner` has them.
        keep: keep the common rows' keys of every layer, for branches that come by later.
        every_row: take all rows to the top that plans can differ in, not only the answer's.

    Attributes:
        spans: where the example's rows lie.
        batch_branches: how many branches run through a layer at once.
        rows_run: rows of layers computed so far.
    """

    def __init__(
        self,
        ends: EmbedAndHead,
        example: Example,
        plans: Sequence[LayerTypes],
        mask: Mask,
        *,
        batch_rows: int,
        keep: bool,
        unbatched: bool,
        every_row: bool = False,
    ) -> None:
        check_prompt(example, mask)
        self.example = example
        spans = token_spans(example, mask, plans, ends.kinds)
        # Predictions of rows below the common ones' end are no news.
        self.spans = replace(spans, answer=spans.common) if every_row else spans
        self.batch_branches = 1 if unbatched else max(1, batch_rows // spans.end)
        self.rows_run = 0
        self._ends = ends
        self._plans = [spans.whole(plan) for plan in plans]
        self._mask = mask
        self._unbatched = unbatched
        self._firsts = [first_rows(layer_types, self.spans, mask) for layer_types in plans]
        self._embeddings, arguments = ends.inputs(example)
        self._runner = LayerRunner(ends, arguments)
        self._common = self._embeddings[:, : self.spans.common]
        self._keep = keep
        self._common_keys: dict[int, KeysAndValues] = {}

    def start(self) -> Branch:
        """The branch of all plans, at the first layer."""
        plans = tuple(range(len(self._plans)))
        first = self._first(plans, 0)
        hidden = self._embeddings[:, first:]
        del self._embeddings
        return Branch(plans, hidden, first)

    def state(self, branches: Sequence[Branch]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """All that `restore` needs to go on from here: tensors, and what belongs to them."""
        tensors = {str(i): branch.hidden for i, branch in enumerate(branches)}
        note = {"branches": json.dumps([[b.plans, b.first] for b in branches])}
        return {"common": self._common, **tensors}, note

    def restore(self, tensors: Mapping[str, torch.Tensor], note: Mapping[str, str]) -> list[Branch]:
        """Go on from the state of another forward pass of the same example and plans."""
        del self._embeddings
        self._common = tensors["common"]
        return [
            Branch(tuple(plans), tensors[str(i)], first)
            for i, (plans, first) in enumerate(json.loads(note["branches"]))
        ]

    def _first(self, plans: tuple[int, ...], layer: int) -> int:
        return min(self._firsts[plan][layer] for plan in plans)

    def run_layer(self, layer: Any, index: int, branches: Sequence[Branch]) -> list[Branch]:
        """Take branches through one layer; a branch becomes one for each type its plans give it."""
        above: list[Branch] = []
        waiting: dict[tuple[str, int, int], list[_Fork]] = {}
        common, own = self._common_keys.get(index), None
        lowest_first = sorted(branches, key=lambda branch: branch.first)
        forks_of_branches = [self._forks(branch, index) for branch in lowest_first]
        if common is None:
            fork = forks_of_branches[0][0]
            # Of a recurrent layer the state between the two is wanted, too.
            apart = (NO_ATTENTION, LINEAR)
            all_rows = fork.after == self.spans.common and fork.layer_type not in apart
            last = index + 1 == len(self._plans[0])
            # The common rows run in one call with a branch that needs all of its rows.
            if all_rows and not last and not self._unbatched:
                fork = forks_of_branches[0].pop(0)
                output, common, own = self._run_with_common(layer, index, fork)
                above.append(output)
            else:
                common = self._run_common(layer, index)
            if self._keep:
                # A copy, for these may be views of all rows' keys, which need not stay in memory.
                self._common_keys[index] = common[0].clone(), common[1].clone()
        for forks in forks_of_branches:
            if own is None and len(forks) == 1:
                (fork,) = forks
                alike = (fork.layer_type, fork.branch.first, fork.after)
                waiting.setdefault(alike, []).append(fork)
                continue
            for fork in forks:
                outputs, keys = self._run(layer, index, [fork], common, own)
                above += outputs
                if fork.after == fork.branch.first and not self._unbatched:
                    # Keys are the same whatever the type, so the next fork need not make them.
                    own = keys
            own = None
        for together in waiting.values():
            for start in range(0, len(together), self.batch_branches):
                batch = together[start : start + self.batch_branches]
                above += self._run(layer, index, batch, common, None)[0]
        return above

    def _forks(self, branch: Branch, index: int) -> list[_Fork]:
        """What becomes of a branch in one layer, the fork that needs the most rows first."""
        plans: dict[str, list[int]] = {}
        for plan in branch.plans:
            plans.setdefault(self._plans[plan][index], []).append(plan)
        forks = [
            _Fork(layer_type, replace(branch, plans=tuple(p)), self._first(tuple(p), index + 1))
            for layer_type, p in plans.items()
        ]
        return sorted(forks, key=lambda fork: fork.after)

    def _run_with_common(
        self, layer: Any, index: int, fork: _Fork
    ) -> tuple[Branch, KeysAndValues, KeysAndValues]:
        """Run a branch from row 0 on; also the keys of the common rows, and its own."""
        hidden = torch.cat([self._common, fork.branch.hidden], dim=1)
        attention = self._ends.attention(fork.layer_type)
        output, keys = self._runner.run(layer, index, attention, hidden, 0, None)
        self.rows_run += self.spans.end
        border = self.spans.common
        self._common = output[:, :border]
        branch = replace(fork.branch, hidden=output[:, border:], first=border)
        return branch, cut(keys, 0, border), cut(keys, border, self.spans.end)

    def _run_common(self, layer: Any, index: int) -> KeysAndValues:
        """Take the common rows through one layer by themselves; their keys."""
        if not self.spans.common:
            # transformers' layers cannot be run on no rows.
            nothing = self._common.new_empty(1, 1, 0, 1)
            return nothing, nothing
        if index + 1 == len(self._plans[0]) and self._ends.kinds[index] != LINEAR:
            return self._runner.keys(layer, index, self._common, 0)
        # Under the window every type that a plan may give is plainly causal.
        attention = self._ends.attention(self._ends.kinds[index])
        self._common, keys = self._runner.run(layer, index, attention, self._common, 0, None)
        self.rows_run += self.spans.common
        return keys

    def _run(
        self,
        layer: Any,
        index: int,
        forks: Sequence[_Fork],
        common: KeysAndValues,
        own: KeysAndValues | None,
    ) -> tuple[list[Branch], KeysAndValues]:
        """Run forks of one type and the same rows as one batch; also the keys of these rows."""
        fork = forks[0]
        hidden = torch.cat([fork.branch.hidden for fork in forks])
        attention = self._ends.attention(fork.layer_type)
        if fork.layer_type == LINEAR:
            first, past = self.spans.common, common if self.spans.common else None
        else:
            first, past = fork.after, self._past(layer, index, fork, hidden, common, own)
        self.rows_run += len(forks) * (self.spans.end - first)
        rows_run = hidden[:, first - fork.branch.first :]
        output, keys = self._runner.run(layer, index, attention, rows_run, first, past)
        output = output[:, fork.after - first :]
        branches = [
            Branch(fork.branch.plans, rows[None], fork.after)
            for fork, rows in zip(forks, output, strict=True)
        ]
        return branches, keys

    def _past(
        self,
        layer: Any,
        index: int,
        fork: _Fork,
        hidden: torch.Tensor,
        common: KeysAndValues,
        own: KeysAndValues | None,
    ) -> KeysAndValues | None:
        """The keys below row `fork.after` that rows from there on may look at."""
        if fork.layer_type == NO_ATTENTION:
            return None
        first, after = fork.branch.first, fork.after
        slides = fork.layer_type == SLIDING and not self._mask.full_attention_decode
        low = max(0, after - self._mask.window_tokens + 1) if slides else 0
        parts = []
        if slides and self._mask.sink_tokens:
            # The layout of the checkpoint's cache: the sinks, then the window without a gap.
            parts.append(cut(common, 0, self._mask.sink_tokens))
        if low < self.spans.common:
            parts.append(cut(common, low, self.spans.common))
        begin = max(low, self.spans.common)
        if own and begin < after:
            parts.append(cut(own, begin - first, after - first))
        elif begin < after:
            rows = hidden[:, begin - first : after - first]
            parts.append(self._runner.keys(layer, index, rows, begin))
        return join(*parts) if parts else None
