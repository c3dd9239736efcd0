"""Many plans in one walk answer exactly as the whole model does under each plan alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.inference.branches import SharedForward
from converter.inference.example import Example
from converter.inference.positions import NO_ATTENTION, LayerTypes, layer_forwards, token_spans
from converter.model.mask import FULL, SLIDING, Mask
from converter.plan.units import Units, switched_plans
from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, Models
from tests.inference.conftest import (
    Plains,
    Runners,
    assert_close,
    floats_left_by,
    rows_given_to_layers,
    whole_logits,
)
from tests.runners import (
    EXAMPLES,
    MASKS,
    SINKS,
    example_of,
    ignore,
    leaving_out,
    loss,
    nlls,
    resident,
    streamed,
    switching,
)

pytestmark = pytest.mark.usefixtures("exactly")

CLOSE = 1e-9


def random_plans(count: int, seed: object) -> list[LayerTypes]:
    generator = random.Random(str(seed))  # noqa: S311 - reproducible
    return [tuple(generator.choices((FULL, SLIDING), k=LAYERS)) for _ in range(count)]


@pytest.mark.parametrize("mask", ["plain", "sinks and full decode"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_family_answers_as_its_whole_model_does(
    family: str, mask: str, plain: Plains, runner: Runners
) -> None:
    for plans in (random_plans(4, family), leaving_out()):
        found = nlls(runner(family, mask), EXAMPLES[:2], plans)
        expected = [[plain(family, mask).nll(e, kinds) for kinds in plans] for e in EXAMPLES[:2]]
        assert_close(found, expected, CLOSE)
        assert min(max(row) - min(row) for row in expected) > 1e-3, "the plans would not differ"


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_every_switch_answers_as_the_whole_model_does(
    mask: str, plain: Plains, runner: Runners
) -> None:
    for plans in (switching(), leaving_out()):
        answers = runner("qwen3", mask).answers(EXAMPLES, plans, ignore)
        for example, row in zip(EXAMPLES, answers, strict=True):
            for kinds, answer in zip(plans, row, strict=True):
                logits = plain("qwen3", mask).logits(example, kinds)
                assert answer.nll == pytest.approx(loss(logits, example), abs=CLOSE)
                assert answer.correct == (logits.argmax(-1).tolist() == list(example.answer))


@given(
    plans=st.sampled_from([SLIDING, NO_ATTENTION]).flatmap(
        lambda other: st.lists(
            st.tuples(*[st.sampled_from([FULL, other])] * LAYERS), min_size=1, max_size=5
        )
    ),
    prompt=st.integers(SINKS + 1, 60),
    answer=st.integers(1, 6),
    mask=st.sampled_from(list(MASKS)),
)
@settings(max_examples=40)
def test_any_plans_answer_as_the_whole_model_does(
    plain: Plains, runner: Runners, plans: list[LayerTypes], prompt: int, answer: int, mask: str
) -> None:
    """Prompts of every length beyond the sinks: up to the window, and longer."""
    example = example_of(prompt, answer)
    (losses,) = nlls(runner("llama", mask), [example], plans)
    expected = [plain("llama", mask).nll(example, kinds) for kinds in plans]
    assert losses == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("mask", ["plain", "sinks", "sinks and full decode"])
def test_the_attention_is_that_of_explicit_masks(mask: str, eager: Models, runner: Runners) -> None:
    """Nothing of ours is in the reference: transformers' eager code under written-down masks."""
    plans = [*random_plans(5, mask), (FULL,) * LAYERS, (SLIDING,) * LAYERS]
    rule, answers = MASKS[mask], nlls(runner("mistral", mask), EXAMPLES, plans)
    for example, losses in zip(EXAMPLES, answers, strict=True):
        prompt = len(example.prompt)
        for kinds, found in zip(plans, losses, strict=True):
            logits = whole_logits(eager("mistral"), example, kinds, rule)[prompt - 1 :]
            assert found == pytest.approx(loss(logits, example), abs=CLOSE)


def test_an_answer_is_right_when_all_its_tokens_are(plain: Plains, runner: Runners) -> None:
    kinds, prompt, answer = (FULL, SLIDING, FULL, SLIDING), example_of(60, 1).prompt, list[int]()
    for _ in range(3):
        logits = plain("qwen2", "plain").logits(Example(prompt, (*answer, 0), ""), kinds)
        answer.append(int(logits[-1].argmax()))
    wrong = (*answer[:-1], (answer[-1] + 1) % 300)
    pair = [Example(prompt, tuple(tokens), "") for tokens in (answer, wrong)]
    answers = runner("qwen2", "plain").answers(pair, [kinds], ignore)
    assert [row[0].correct for row in answers] == [True, False]


@pytest.mark.parametrize("mask", ["plain", "sinks", "full decode"])
@pytest.mark.parametrize("batch_rows", [1, 160, 400])
def test_few_branches_at_a_time_answer_as_all_at_once(
    mask: str, batch_rows: int, sources: dict[str, Path], runner: Runners
) -> None:
    """Depth first, with one, two or some branches in a batch, and breadth first."""
    plans = switching() + random_plans(6, mask)
    few = resident(sources["qwen3"], MASKS[mask], batch_rows=batch_rows)
    found = nlls(few, EXAMPLES, plans)
    for other in (runner("qwen3", mask), streamed(sources["qwen3"], MASKS[mask])):
        assert_close(found, nlls(other, EXAMPLES, plans))


def test_equal_plans_and_plans_in_another_order_get_equal_floats_one_by_one(
    runner: Runners,
) -> None:
    """The null control stands on this."""
    alone = runner("qwen3", "plain").one_by_one()
    plans = random_plans(6, "order")
    (found,) = nlls(alone, EXAMPLES[:1], plans + plans[:1])
    (reversed_,) = nlls(alone, EXAMPLES[:1], plans[::-1])
    assert found == [*reversed_[::-1], found[0]]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_rows", [1, 4096])
def test_what_is_run_is_what_was_foretold_and_what_is_counted(
    mask: str, batch_rows: int, sources: dict[str, Path]
) -> None:
    rule, few = MASKS[mask], resident(sources["qwen3"], MASKS[mask], batch_rows=batch_rows)
    rows = rows_given_to_layers(few)
    for plans in (switching(), random_plans(3, mask), [(SLIDING,) * LAYERS], leaving_out()):
        for example in EXAMPLES:
            done: list[float] = []
            rows.clear()
            few.answers([example], plans, done.append)
            spans = token_spans(example, rule, plans)
            assert sum(done) == pytest.approx(layer_forwards(plans, spans, rule))
            assert sum(rows) == pytest.approx(sum(done) * spans.end)


def test_sharing_and_leaving_out_cost_less_than_one_pass_for_each_plan() -> None:
    """For 8 layers restore-one and remove-one, at a prompt many windows long."""
    total, mask = 8, Mask(16)
    spans = token_spans(example_of(400, 4), mask)
    restored, removed = (switched_plans(one, Units(total), range(total)) for one in (SLIDING, FULL))
    uniform = [removed[0], restored[0]]
    naive = (total + 2) * total
    for one_switched, most in ((restored[1:], 0.5), (removed[1:], 0.6)):
        plans = [*uniform, *one_switched]
        assert layer_forwards(plans, spans, mask) < most * naive
        # Prefixes alone: every plan from its fork on, which leaving rows out only undercuts.
        forks = {kinds[: layer + 1] for kinds in plans for layer in range(total)}
        assert layer_forwards(plans, spans, mask) < len(forks)
    # A single full plan needs every row everywhere, but for the last layer.
    assert layer_forwards(uniform[:1], spans, mask) == pytest.approx(total - 1, abs=0.05)


def test_the_last_model_that_was_loaded_does_not_get_in_the_way(sources: dict[str, Path]) -> None:
    """Modeling files of several families share a process, and the name of their attention."""
    first = resident(sources["qwen3"], MASKS["sinks"])
    plans = random_plans(3, "several")
    before = nlls(first, EXAMPLES[:1], plans)
    weights = ((0.5,),) * LAYERS
    gradients = first.gate_gradients(EXAMPLES[:1], weights, ignore)
    resident(sources["mistral"], MASKS["plain"])
    assert nlls(first, EXAMPLES[:1], plans) == before
    assert first.gate_gradients(EXAMPLES[:1], weights, ignore) == gradients


@pytest.mark.parametrize("way", ["few at a time", "all at once", "streamed"])
def test_a_forward_pass_that_has_ended_holds_nothing(way: str, sources: dict[str, Path]) -> None:
    """Without the garbage collector, which nothing calls when a GPU's memory is full."""
    if way == "streamed":
        model = streamed(sources["qwen3"], MASKS["sinks"])
    else:
        rows = 1 if way == "few at a time" else 4096
        model = resident(sources["qwen3"], MASKS["sinks"], batch_rows=rows)

    def run() -> None:
        nlls(model, EXAMPLES, switching())
        model.divergences(EXAMPLES[:2], switching(), ignore, every_row=True)

    # The first call fills caches, such as that of the attention's masks.
    run()
    assert floats_left_by(run) == 0


def test_the_keys_that_are_kept_keep_no_others(runner: Runners) -> None:
    """Those of the common rows only, not views of every row's."""
    model = runner("qwen3")
    forward = SharedForward(
        model._ends, EXAMPLES[2], switching(), model.mask, batch_rows=1, keep=True, unbatched=False
    )
    branches = [forward.start()]
    for index, layer in model._modules.visit(range(LAYERS)):
        branches = forward.run_layer(layer, index, branches)
    assert sorted(forward._common_keys) == list(range(LAYERS))
    for states in forward._common_keys.values():
        assert [s.untyped_storage().nbytes() for s in states] == [s.nbytes for s in states]
