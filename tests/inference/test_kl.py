"""KL to the full model, against transformers' eager code under masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converter.inference.branches import Branch
from converter.inference.kl import Divergence
from converter.inference.positions import (
    LayerTypes,
    divergence_layer_forwards,
    layer_forwards,
    token_spans,
)
from converter.inference.waiting import ActivationOffload
from converter.model.mask import FULL, SLIDING
from tests.brute_force import EagerModel
from tests.conftest import LAYERS, Models
from tests.inference.conftest import Killed, Runners, assert_close, killed, whole_logits
from tests.runners import (
    EXAMPLES,
    MASKS,
    example_of,
    ignore,
    leaving_out,
    resident,
    streamed,
    switching,
)

pytestmark = pytest.mark.usefixtures("exactly")

CLOSE = 1e-9
WHOLE = (FULL,) * LAYERS
PLANS: list[LayerTypes] = [
    (SLIDING,) * LAYERS,
    (SLIDING, FULL, SLIDING, SLIDING),
    (FULL, FULL, SLIDING, FULL),
    (SLIDING, SLIDING, SLIDING, FULL),
    WHOLE,
]


def by_definition(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean over rows of the sum over tokens of p (ln p - ln q), in float64."""
    p = teacher.double().softmax(dim=-1)
    q = student.double().softmax(dim=-1)
    return float((p * (p.log() - q.log())).sum(dim=-1).mean())


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize(
    ("family", "mask"),
    [*(("mistral", mask) for mask in MASKS), ("granite", "sinks"), ("gemma", "full decode")],
)
def test_the_divergence_is_that_of_explicit_masks(
    family: str, mask: str, every_row: bool, eager: Models, runner: Runners
) -> None:
    rule = MASKS[mask]
    found = runner(family, mask).divergences(EXAMPLES, PLANS, ignore, every_row=every_row)
    for example, row in zip(EXAMPLES, found, strict=True):
        first = 0 if every_row else len(example.prompt) - 1
        logits = [whole_logits(eager(family), example, plan, rule)[first:] for plan in PLANS]
        expected = [by_definition(logits[-1], student) for student in logits]
        assert row == pytest.approx(expected, abs=CLOSE)
        assert row[-1] == 0
        assert (max(expected) > 1e-2) is (mask != "longer than the prompt")


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("mask", ["plain", "sinks and full decode"])
def test_every_way_to_walk_finds_the_same(
    mask: str, every_row: bool, sources: dict[str, Path], runner: Runners, tmp_path: Path
) -> None:
    """The full model is the trunk of half of these plans, and still the first at the top."""
    plans, rule, source = switching(), MASKS[mask], sources["qwen3"]
    expected = runner("qwen3", mask).divergences(EXAMPLES, plans, ignore, every_row=every_row)
    for other in (
        resident(source, rule, batch_rows=1),
        resident(source, rule, batch_rows=400),
        runner("qwen3", mask).one_by_one(),
        streamed(source, rule),
        streamed(source, rule, plans_together=3),
        streamed(source, rule, offload=tmp_path / "waiting"),
    ):
        found = other.divergences(EXAMPLES, plans, ignore, every_row=every_row)
        assert_close(found, expected)
    assert list((tmp_path / "waiting").iterdir()) == []


@pytest.mark.parametrize("every_row", [False, True])
def test_what_sliding_does_not_change_is_no_divergence_at_all(
    every_row: bool, runner: Runners
) -> None:
    """The null control: within the window nothing is hidden, so every score is exactly 0."""
    alone = runner("qwen3", "sinks").one_by_one()
    within = [example_of(11, 5), example_of(4, 1)]
    found = alone.divergences(within, switching(), ignore, every_row=every_row)
    assert found == [[0.0] * len(switching())] * 2


@pytest.mark.parametrize("every_row", [False, True])
def test_plans_that_miss_attention_differ_from_the_first_row_on(
    every_row: bool, sources: dict[str, Path], runner: Runners
) -> None:
    """No rows are common then; a layer without attention is one whose output is projected to 0."""
    rule, example = MASKS["plain"], EXAMPLES[1]
    first = 0 if every_row else len(example.prompt) - 1
    teacher = whole_logits(EagerModel(sources["qwen3"]), example, WHOLE, rule)[first:]
    expected = [0.0]
    for missing in ([0], [1], [2], [3], [0, 1, 2, 3]):
        without = EagerModel(sources["qwen3"])
        for layer in missing:
            torch.nn.init.zeros_(without.model.model.layers[layer].self_attn.o_proj.weight)
        logits = whole_logits(without, example, WHOLE, rule)[first:]
        expected.append(by_definition(teacher, logits))
    (found,) = runner("qwen3", "plain").divergences(
        [example], leaving_out(), ignore, every_row=every_row
    )
    assert found == pytest.approx(expected, abs=CLOSE)
    assert min(found[1:]) > 1e-3


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_a_divergence_costs_what_was_foretold(mask: str, every_row: bool, runner: Runners) -> None:
    rule, done = MASKS[mask], list[float]()
    runner("qwen3", mask).divergences(EXAMPLES, PLANS[:4], done.append, every_row=every_row)
    foretold = [
        divergence_layer_forwards(PLANS[:4], token_spans(e, rule), rule, every_row=every_row)
        for e in EXAMPLES
    ]
    assert sum(done) == pytest.approx(sum(foretold))
    # A full layer on top of a sliding one needs every row anyway; only the tops differ.
    answers = [layer_forwards([WHOLE, *PLANS[:4]], token_spans(e, rule), rule) for e in EXAMPLES]
    assert (sum(foretold) > sum(answers)) is (every_row and mask != "longer than the prompt")


def test_states_of_a_walk_to_other_rows_are_not_taken_for_ours(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed over the answer's rows leaves states that lack the other rows."""
    rule = MASKS["plain"]
    runner = streamed(sources["qwen3"], rule, offload=tmp_path / "waiting")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ActivationOffload, "drop", killed)
        runner.divergences(EXAMPLES[:1], PLANS, ignore, every_row=False)
    assert len(list((tmp_path / "waiting").iterdir())) == 1
    expected = streamed(sources["qwen3"], rule)
    for every_row in (True, False):
        found = runner.divergences(EXAMPLES[:1], PLANS, ignore, every_row=every_row)
        assert_close(found, expected.divergences(EXAMPLES[:1], PLANS, ignore, every_row=every_row))


class Head:
    """Stands for a model whose hidden states are its logits; takes few rows at a time."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same."""
        assert hidden.shape[0] * hidden.shape[1] <= 500
        return hidden


def test_half_precision_and_many_rows_and_a_wide_vocabulary() -> None:
    """At least float32 whatever the logits are in, and few rows of logits at a time."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 1, 300, 5000)).to(torch.bfloat16)
    logits[2] = logits[0]
    branches = [Branch((2 - i, 5 - i), one, 0) for i, one in enumerate(logits)]
    found = Divergence(Head(), 600, leader=2).read(branches)  # type: ignore[arg-type]
    expected = by_definition(logits[0, 0], logits[1, 0]) / 2
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    assert found[1] == found[4] == pytest.approx(expected, rel=1e-5)
    assert found[0] == found[2] == found[3] == found[5] == 0
