"""What the last rows look at, against the attention weights that transformers' own code returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from converter.inference.example import Example
from converter.inference.positions import mass_layer_forwards, token_spans
from converter.model.mask import Mask
from tests.brute_force import EagerModel
from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, Models
from tests.inference.conftest import Runners, assert_close, rows_given_to_layers
from tests.runners import EXAMPLES, MASKS, example_of, ignore, nlls, resident, streamed, switching

pytestmark = pytest.mark.usefixtures("exactly")

# Prompts shorter than the rows that are asked, just as long, one longer, and much longer.
LENGTHS = (10, 32, 33, 150)
PROMPTS = [example_of(length, 1 + place) for place, length in enumerate(LENGTHS)]
LIMITS = {"sinks": 4, "recent": 16, "last": 32}


def near(model: EagerModel, example: Example, sinks: int, recent: int, last: int) -> list[float]:
    """The definition, one row and one key at a time."""
    shares = []
    for weights in model.attentions(example.prompt):
        by_row = weights.mean(dim=0)
        rows = range(max(0, len(by_row) - last), len(by_row))
        masses = [
            float(sum(by_row[q, p] for p in range(q + 1) if p < sinks or q - p < recent))
            for q in rows
        ]
        shares.append(sum(masses) / len(masses))
    return shares


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_family_s_attention_is_weighed_as_its_own_code_computes_it(
    family: str, eager: Models, runner: Runners
) -> None:
    found = runner(family).attention_mass(PROMPTS, ignore, **LIMITS)
    assert_close(found, [near(eager(family), example, **LIMITS) for example in PROMPTS], 1e-9)
    # What is asked for is no constant: long prompts have much besides.
    assert max(found[-1]) < 0.9
    assert found[0] == pytest.approx([1.0] * LAYERS)


@pytest.mark.parametrize(
    ("sinks", "recent", "last"),
    [(0, 1, 1), (0, 7, 5), (9, 1, 200), (150, 1, 32), (100, 100, 32), (1, 149, 2), (4, 500, 32)],
)
def test_a_key_counts_once_wherever_it_stands(
    sinks: int, recent: int, last: int, eager: Models, runner: Runners
) -> None:
    limits = {"sinks": sinks, "recent": recent, "last": last}
    (found,) = runner("qwen3").attention_mass(PROMPTS[3:], ignore, **limits)
    assert found == pytest.approx(near(eager("qwen3"), PROMPTS[3], **limits), abs=1e-9)
    covered = sinks + recent >= len(PROMPTS[3].prompt)
    assert (found == pytest.approx([1.0] * LAYERS, abs=1e-12)) is covered


@pytest.mark.parametrize("mask", ["sinks and full decode", "one token"])
def test_neither_the_mask_nor_the_answer_nor_where_layers_are_matters(
    mask: str, sources: dict[str, Path], runner: Runners, tmp_path: Path
) -> None:
    expected = runner("qwen2").attention_mass(PROMPTS, ignore, **LIMITS)
    answered = [Example(e.prompt, (5, 6, 7, 8), "") for e in PROMPTS]
    places = (None, tmp_path / "waiting")
    readers = [streamed(sources["qwen2"], MASKS[mask], offload=place) for place in places]
    for other in (runner("qwen2", mask), *readers):
        assert_close(other.attention_mass(answered, ignore, **LIMITS), expected)


class Largest(TorchFunctionMode):
    """Notes the shape of the scores whose sums are taken."""

    shapes: ClassVar[set[tuple[int, ...]]] = set()

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function is torch.Tensor.logsumexp:
            self.shapes.add(tuple(arguments[0].shape))
        return function(*arguments, **(options or {}))


def test_only_the_rows_that_are_asked_are_weighed(runner: Runners) -> None:
    """Never (prompt, prompt): queries of one key head, rows, keys."""
    with Largest() as largest:
        runner("qwen3").attention_mass(PROMPTS[3:], ignore, **LIMITS)
    assert largest.shapes == {(2, 32, 150)}


def test_weighing_costs_what_was_foretold_and_that_is_what_is_run(sources: dict[str, Path]) -> None:
    runner = resident(sources["qwen3"], Mask(16))
    rows = rows_given_to_layers(runner)
    for example in (*PROMPTS, *EXAMPLES):
        done = list[float]()
        rows.clear()
        runner.attention_mass([example], done.append, **LIMITS)
        spans = token_spans(example, Mask(16))
        assert sum(done) == pytest.approx(mass_layer_forwards(spans, LAYERS, 32))
        assert sum(rows) == pytest.approx(sum(done) * spans.end)


def test_the_attention_that_weighs_is_taken_out_again(runner: Runners) -> None:
    model = runner("llama", "sinks")
    before = nlls(model, EXAMPLES[:1], switching())
    model.attention_mass(EXAMPLES[:1], ignore, **LIMITS)
    assert nlls(model, EXAMPLES[:1], switching()) == before
