"""Rows that are left out cannot change the answer, and no row is kept that could be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import DataError
from converter.inference.example import Example
from converter.inference.gate_gradients import gate_layer_types
from converter.inference.positions import (
    NO_ATTENTION,
    LayerTypes,
    check_prompt,
    first_rows,
    gradient_layer_forwards,
    layer_forwards,
    token_spans,
    widest_rows,
)
from converter.model.mask import FULL, SLIDING, Mask
from tests.brute_force import Rule
from tests.conftest import LAYERS
from tests.inference.conftest import Runners
from tests.runners import EXAMPLES, MASKS, Plain, example_of

KINDS = st.sampled_from([FULL, SLIDING, NO_ATTENTION])
SMALL_MASKS = st.builds(Mask, st.integers(1, 9), st.integers(0, 3), st.booleans())


def needed_rows(kinds: LayerTypes, prompt: int, end: int, mask: Mask) -> list[set[int]]:
    """By reachability over the masks as they are defined: rows that the answer depends on.

    Returns:
        The needed rows of each layer's input, and last those of the head's.
    """
    full, generated = Rule(None), prompt if mask.full_attention_decode else None
    sliding = Rule(mask.window_tokens, mask.sink_tokens, generated)
    needed = set(range(prompt - 1, end))
    levels = [needed]
    for kind in reversed(kinds):
        if kind != NO_ATTENTION:
            rule = full if kind == FULL else sliding
            needed = {p for q in needed for p in range(q + 1) if rule.sees(q, p, 0)}
        levels.append(needed)
    return levels[::-1]


@given(st.lists(KINDS, min_size=1, max_size=6), st.integers(2, 40), st.integers(1, 5), SMALL_MASKS)
def test_the_rows_that_the_answer_depends_on_are_computed_and_no_others(
    kinds: list[str], prompt: int, answer: int, mask: Mask
) -> None:
    spans = token_spans(example_of(prompt, answer), mask)
    firsts = first_rows(tuple(kinds), spans, mask)
    levels = needed_rows(tuple(kinds), prompt, spans.end, mask)
    assert len(firsts) == len(levels) == len(kinds) + 1
    for first, needed in zip(firsts, levels, strict=True):
        assert spans.common <= first <= spans.answer
        # Common rows are computed for all plans together.
        uncommon = {row for row in needed if row >= spans.common}
        # Under full_attention_decode no answer of one token is read back: more is computed there.
        exact = not mask.full_attention_decode or answer > 1
        assert first == min(uncommon) if exact else first <= min(uncommon)


@given(st.integers(2, 60), st.integers(1, 9), SMALL_MASKS)
def test_common_rows_see_everything_before_them_in_sliding_layers_too(
    prompt: int, answer: int, mask: Mask
) -> None:
    spans = token_spans(example_of(prompt, answer), mask)
    rule = Rule(mask.window_tokens, mask.sink_tokens)
    for row in range(spans.common):
        assert all(rule.sees(row, p, 0) for p in range(row + 1))
    # And as many rows as that holds for, but for those that predict the answer.
    if spans.common < spans.answer:
        assert not all(rule.sees(spans.common, p, 0) for p in range(spans.common + 1))
    assert (spans.answer, spans.end, spans.prompt) == (prompt - 1, prompt + answer - 1, prompt)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("mask", ["plain", "sinks", "full decode"])
def test_what_lies_below_the_first_row_cannot_change_the_answer(
    mask: str, sources: dict[str, Path]
) -> None:
    """At every layer of the real model: noise in the rows that are left out, common ones aside."""
    rule = MASKS[mask]
    plain = Plain(sources["qwen3"], rule)
    example = EXAMPLES[2]
    spans = token_spans(example, rule)
    layers = plain.model.get_decoder().layers
    for kinds in [
        (FULL, SLIDING, SLIDING, SLIDING),
        (SLIDING, FULL, SLIDING, SLIDING),
        (SLIDING,) * LAYERS,
        (FULL, FULL, NO_ATTENTION, SLIDING),
    ]:
        expected = plain.logits(example, kinds)

        for layer, first in zip(layers, first_rows(kinds, spans, rule)[:-1], strict=True):
            below, kept = (
                float(
                    (logits_with_noise(plain, layer, rows, example, kinds) - expected).abs().max()
                )
                for rows in (slice(spans.common, first), first)
            )
            # The first row that is kept does reach the answer.
            assert below < 1e-10 and kept > 1e-16


def logits_with_noise(
    plain: Plain, layer: Any, rows: slice | int, example: Example, kinds: LayerTypes
) -> torch.Tensor:
    """The answer's logits when some rows of a layer's input are something else."""

    def disturb(_module: object, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = given[0].clone()
        hidden[:, rows] += 1.0
        return (hidden, *given[1:])

    handle = layer.register_forward_pre_hook(disturb)
    try:
        return plain.logits(example, kinds)
    finally:
        handle.remove()


def test_known_first_rows() -> None:
    spans = token_spans(example_of(100, 3), Mask(10, 2))
    assert (spans.common, spans.answer, spans.end) == (12, 99, 102)
    assert first_rows((FULL, SLIDING, SLIDING), spans, Mask(10, 2)) == (12, 81, 90, 99)
    assert first_rows((SLIDING, SLIDING, FULL), spans, Mask(10, 2)) == (12, 12, 12, 99)
    assert first_rows((SLIDING, NO_ATTENTION, SLIDING), spans, Mask(10, 2)) == (81, 90, 90, 99)
    assert first_rows((SLIDING,) * 20, spans, Mask(10, 2))[0] == 12
    decode = Mask(10, 2, True)
    assert first_rows((SLIDING, SLIDING, SLIDING), spans, decode) == (12, 12, 12, 99)


@given(
    st.lists(st.tuples(KINDS, KINDS, KINDS), min_size=1, max_size=6),
    st.integers(2, 60),
    st.integers(1, 5),
    SMALL_MASKS,
)
def test_rows_are_counted_as_the_branches_are(
    plans: list[LayerTypes], prompt: int, answer: int, mask: Mask
) -> None:
    """The sum over layers of the rows of each different beginning, and the largest of its terms."""
    spans = token_spans(example_of(prompt, answer), mask)
    firsts = {kinds: first_rows(kinds, spans, mask) for kinds in plans}
    rows = []
    for depth in (1, 2, 3):
        beginnings = {kinds[:depth] for kinds in plans}
        kept = [min(f[depth] for k, f in firsts.items() if k[:depth] == b) for b in beginnings]
        rows.append(sum(spans.end - first for first in kept))
    cost = (2 * spans.common + sum(rows)) / spans.end
    assert layer_forwards(plans, spans, mask) == pytest.approx(cost)
    assert widest_rows(plans, spans, mask) == spans.common + max(rows)
    # A plan that is given twice costs nothing.
    assert layer_forwards(plans * 2, spans, mask) == layer_forwards(plans, spans, mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "weights", [(0.0,) * 4, (0.5,) * 4, (0.5, 0.0, 1.0, 0.0), (0.0, 0.2, 0.0, 0.0)], ids=str
)
def test_a_way_up_and_down_costs_what_was_foretold(
    mask: str, weights: tuple[float, ...], runner: Runners
) -> None:
    rule, done = MASKS[mask], list[float]()
    gates = tuple((weight,) for weight in weights)
    runner("qwen3", mask).gate_gradients(EXAMPLES, gates, done.append)
    kinds = gate_layer_types(gates)
    foretold = [gradient_layer_forwards(kinds, token_spans(e, rule), rule) for e in EXAMPLES]
    assert sum(done) == pytest.approx(sum(foretold))


@pytest.mark.parametrize(("prompt", "sinks"), [(1, 0), (3, 3)])
def test_a_prompt_without_room_for_the_sinks_is_refused(prompt: int, sinks: int) -> None:
    with pytest.raises(DataError, match="at least"):
        check_prompt(Example((1,) * prompt, (2,), "short"), Mask(16, sinks))
