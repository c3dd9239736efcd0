"""Models with layers that no plan changes: recurrent ones, and ones that slide by themselves."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.checkpoint.format import config_layer_types
from converter.inference.embed_and_head import EmbedAndHead, answer_nll
from converter.inference.layers import ResidentLayers, StreamedLayers
from converter.inference.load import load_model
from converter.inference.positions import (
    NO_ATTENTION,
    gradient_layer_forwards,
    layer_forwards,
    token_spans,
)
from converter.inference.runner import ModelRunner
from converter.model.mask import FULL, LINEAR, SLIDING, Mask
from converter.model.source import Source, open_source
from converter.plan.plan import layer_types_of
from tests.conftest import MIXED_FAMILIES, make_model, three_to_one
from tests.runners import EXACT, EXAMPLES, MASKS, Exactly, ignore

PLANS = list(product((FULL, SLIDING), repeat=2))
CASES = [
    (family, mask)
    for family in MIXED_FAMILIES
    for mask in ("plain", "sinks", "full decode", "one token", "longer than the prompt")
]
CASES += [("qwen3_5", "sinks"), ("three to one", "plain"), ("three to one", "full decode")]


@pytest.fixture(scope="module", autouse=True)
def _exactly() -> Any:
    with Exactly():
        yield


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root: Path = tmp_path_factory.mktemp("mixed")
    made = {f: make_model(root / f, f) for f in [*MIXED_FAMILIES, "qwen3_5"]}
    made["three to one"] = three_to_one(root / "three to one")
    return {name: open_source(str(folder)) for name, folder in made.items()}


class Naive:
    """The whole model, a pass for each plan over every row; it and its runner."""

    def __init__(self, source: Source, mask: Mask, *, streamed: bool = False) -> None:
        self.source, self.mask, self.model = source, mask, load_model(source, mask, EXACT)
        again = load_model(source, mask, EXACT, whole=not streamed)
        layers: Any
        if streamed:
            layers = StreamedLayers(source, again, "cpu", torch.float64)
            ends = EmbedAndHead(again)
        else:
            layers = ResidentLayers(again.get_decoder().layers)
            ends = EmbedAndHead(again)
        self.runner = ModelRunner(ends, layers, mask, 4096)

    def nll(self, example: Any, kinds: tuple[str, ...]) -> torch.Tensor:
        """Mean loss of the answer, the layers that may slide being of these kinds."""
        may_slide = self.source.shape.full_layers
        full = [layer for layer, kind in zip(may_slide, kinds, strict=True) if kind == FULL]
        self.model.set_full_attention_layers(full)
        ids = torch.tensor([[*example.prompt, *example.answer[:-1]]])
        with torch.inference_mode():
            logits = self.model(ids, use_cache=False, prompt_length=len(example.prompt)).logits[0]
        return answer_nll(logits[len(example.prompt) - 1 :], example)


@pytest.mark.parametrize(("family", "mask"), CASES)
def test_shared_passes_answer_as_naive_ones_and_cost_what_was_foretold(
    family: str, mask: str, mixed: dict[str, Source]
) -> None:
    naive = Naive(mixed[family], MASKS[mask])
    for example in EXAMPLES:
        cost: list[float] = []
        (answers,) = naive.runner.answers([example], PLANS, cost.append)
        for kinds, answer in zip(PLANS, answers, strict=True):
            assert answer.nll == pytest.approx(float(naive.nll(example, kinds)), abs=1e-10)
        spans = token_spans(example, naive.mask, kinds=naive.source.shape.kinds)
        assert sum(cost) == pytest.approx(layer_forwards(PLANS, spans, naive.mask))


@pytest.mark.parametrize("family", [*MIXED_FAMILIES, "qwen3_5"])
def test_layers_read_from_disk_answer_the_same(family: str, mixed: dict[str, Source]) -> None:
    naive = Naive(mixed[family], MASKS["sinks"], streamed=True)
    found = naive.runner.answers(EXAMPLES, PLANS, ignore)
    for example, answers in zip(EXAMPLES, found, strict=True):
        for kinds, answer in zip(PLANS, answers, strict=True):
            assert answer.nll == pytest.approx(float(naive.nll(example, kinds)), abs=1e-10)


@pytest.mark.parametrize("family", MIXED_FAMILIES)
@pytest.mark.parametrize("mask", ["plain", "full decode"])
def test_gates_have_the_derivatives_that_small_steps_show(
    family: str, mask: str, mixed: dict[str, Source]
) -> None:
    """Central differences through the recurrent layers, whose own code passes the gradient."""
    runner = Naive(mixed[family], MASKS[mask]).runner
    example, weights, step = EXAMPLES[1], (0.3, 0.6), 1e-5
    cost: list[float] = []
    (found,) = runner.gate_gradients([example], [(w,) for w in weights], cost.append)
    for layer in range(2):
        ends = []
        for sign in (1, -1):
            moved = [(w + sign * step * (i == layer),) for i, w in enumerate(weights)]
            (there,) = runner.gate_gradients([example], tuple(moved), ignore)
            ends.append(there.loss)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert found.slopes[layer] == pytest.approx(slope, rel=1e-5, abs=1e-9)
    spans = token_spans(example, MASKS[mask], kinds=mixed[family].shape.kinds)
    assert sum(cost) == pytest.approx(gradient_layer_forwards((FULL, FULL), spans, MASKS[mask]))
    (open_,) = runner.gate_gradients([example], ((1.0,),) * 2, ignore)
    (answers,) = runner.answers([example], [(FULL, FULL)], ignore)
    assert open_.loss == pytest.approx(answers[0].nll, abs=1e-10)


@pytest.mark.parametrize("family", MIXED_FAMILIES)
def test_a_layer_can_be_left_without_attention(family: str, mixed: dict[str, Source]) -> None:
    runner = Naive(mixed[family], MASKS["plain"]).runner
    (whole, missing) = runner.answers([EXAMPLES[0]], [(FULL, FULL), (NO_ATTENTION, FULL)], ignore)[
        0
    ]
    assert abs(whole.nll - missing.nll) > 1e-3
    masses = runner.attention_mass([EXAMPLES[0]], ignore, sinks=2, recent=8, last=16)
    assert len(masses[0]) == 2
    assert all(0 < share < 1 for share in masses[0])


def test_what_no_plan_changes_is_counted_and_named(mixed: dict[str, Source]) -> None:
    shape = mixed["qwen3_5_text"].shape
    assert shape.layer_kinds == (LINEAR, FULL) * 2
    assert shape.full_layers == (1, 3)
    # 4 value heads of 16 by 16 in float32; 4 inputs of 2 * 32 + 64 channels in float32.
    assert shape.state_bytes == 4 * 16 * 16 * 4 + 4 * 128 * 4
    kinds = layer_types_of((3,), 4, shape.kinds)
    assert kinds == (LINEAR, SLIDING, LINEAR, FULL)
    assert config_layer_types(shape, kinds) == [LINEAR, FULL] * 2
