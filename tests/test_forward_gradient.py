"""Derivatives by the gates, against attention that mixes both kinds under written-down masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from converter.data import Example
from converter.forward.meter import Meter
from converter.mask import FULL, SLIDING, Mask
from converter.selectors import SCORERS
from tests.brute_force import Rule, attention
from tests.conftest import LAYERS, make_model
from tests.meters import EXAMPLES, MASKS, example_of, ignore, nlls, resident

pytestmark = pytest.mark.usefixtures("exactly")

NAME = "brute_force_mixed"


def mixed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: object,
    *,
    scaling: float,
    gates: torch.Tensor,
    seen: dict[str, torch.Tensor],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Both kinds by plain softmax, mixed by the layer's gate."""
    full, sliding = (
        attention(query, key, value, seen[kind][None], scaling) for kind in (FULL, SLIDING)
    )
    return sliding + gates[module.layer_idx] * (full - sliding), None


AttentionInterface.register(NAME, mixed_attention)


class Mixed:
    """The source in transformers' own class, with gates; nothing of `converter` is used."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation=NAME, local_files_only=True
        ).eval()

    def loss(self, example: Example, mask: Mask, gates: torch.Tensor) -> torch.Tensor:
        """Mean answer NLL."""
        ids = [*example.prompt, *example.answer[:-1]]
        prompt, rows = len(example.prompt), range(len(ids))
        generated = prompt if mask.full_attention_decode else None
        sliding = Rule(mask.window_tokens, mask.sink_tokens, generated)
        seen = {
            kind: rule.matrix(rows, rows, [0] * len(ids))
            for kind, rule in ((FULL, Rule(None)), (SLIDING, sliding))
        }
        logits = self.model(torch.tensor([ids]), use_cache=False, gates=gates, seen=seen).logits[0]
        answer = torch.tensor(example.answer)
        return torch.nn.functional.cross_entropy(logits[prompt - 1 :], answer)

    def slopes(self, example: Example, mask: Mask, weight: float) -> list[float]:
        """The derivative by each gate, by torch through everything at once."""
        gates = torch.full((LAYERS,), weight, dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(self.loss(example, mask, gates), gates)
        found: list[float] = slopes.tolist()
        return found


@pytest.fixture(scope="module")
def mixed(sources: dict[str, Path]) -> Callable[[str], Mixed]:
    return cache(lambda family: Mixed(sources[family]))


@pytest.fixture(scope="module")
def meter(sources: dict[str, Path]) -> Callable[[str, str], Meter]:
    return cache(lambda family, mask: resident(sources[family], MASKS[mask]))


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("mask", MASKS)
def test_the_derivative_is_that_of_mixed_attention(
    mask: str, weight: float, mixed: Callable[[str], Mixed], meter: Callable[..., Meter]
) -> None:
    examples = EXAMPLES[:2]
    model = mixed("qwen3")
    found = meter("qwen3", mask).gate_gradients(examples, weight, ignore)
    for example, gradients in zip(examples, found, strict=True):
        gates = torch.full((LAYERS,), weight, dtype=torch.float64)
        with torch.no_grad():
            loss = float(model.loss(example, MASKS[mask], gates))
        assert gradients.nll == pytest.approx(loss, abs=1e-9)
        slopes = model.slopes(example, MASKS[mask], weight)
        assert gradients.by_layer == pytest.approx(slopes, abs=1e-9)
        assert (max(map(abs, slopes)) > 1e-2) is (mask != "longer than the prompt")


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_derivative_is_the_slope_of_the_loss(
    weight: float, mixed: Callable[[str], Mixed], meter: Callable[..., Meter]
) -> None:
    """Central differences: no derivative is taken by anyone but us."""
    example, mask, step = EXAMPLES[1], MASKS["sinks"], 1e-5
    (found,) = meter("llama", "sinks").gate_gradients([example], weight, ignore)
    model = mixed("llama")
    for layer in range(LAYERS):
        losses = []
        for sign in (1, -1):
            gates = torch.full((LAYERS,), weight, dtype=torch.float64)
            gates[layer] += sign * step
            with torch.no_grad():
                losses.append(float(model.loss(example, mask, gates)))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert found.by_layer[layer] == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma", "granite", "olmo2", "phi3", "smollm3"])
def test_every_family_has_derivatives(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / family, family)
    example = EXAMPLES[1]
    options = {"experts_implementation": "eager"} if family == "qwen3_moe" else {}
    model = Mixed.__new__(Mixed)
    model.model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation=NAME, local_files_only=True, **options
    ).eval()
    for weight in (0.0, 0.5):
        (found,) = resident(folder, MASKS["plain"]).gate_gradients([example], weight, ignore)
        slopes = model.slopes(example, MASKS["plain"], weight)
        assert found.by_layer == pytest.approx(slopes, abs=1e-9)


def test_the_ends_are_the_uniform_plans(meter: Callable[..., Meter]) -> None:
    examples = [*EXAMPLES, example_of(5, 2)]
    for mask in ("plain", "sinks and full decode"):
        losses = nlls(meter("qwen2", mask), examples, [(SLIDING,) * LAYERS, (FULL,) * LAYERS])
        for weight, place in ((0.0, 0), (1.0, 1)):
            found = meter("qwen2", mask).gate_gradients(examples, weight, ignore)
            expected = [row[place] for row in losses]
            assert [gradients.nll for gradients in found] == pytest.approx(expected, abs=1e-9)
            # A prompt within the window: the gates mix what is equal.
            assert found[-1].by_layer == pytest.approx([0.0] * LAYERS, abs=1e-12)


def test_small_effects_are_the_restore_one_scores(sources: dict[str, Path], tmp_path: Path) -> None:
    """With values shrunk a layer's attention is a small change, and so nearly linear."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(sources["mistral"], tmp_path / "small"))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "v_proj" in name:
            weights[name] = tensor * 1e-5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    meter = resident(folder, MASKS["plain"])
    layers = range(LAYERS)
    first, exact = (
        SCORERS[name].measure(meter, EXAMPLES, layers, ignore)
        for name in ("first-order", "nll-restore")
    )
    for left, right in zip(first, exact, strict=True):
        assert left.sliding == pytest.approx(right.sliding, abs=1e-12)
        assert left.full is None
        for linear, whole in zip(left.scores, right.scores, strict=True):
            assert whole is not None
            assert linear == pytest.approx(whole, rel=1e-2)
            assert abs(whole) > 1e-7


def test_a_path_integral_sums_to_the_gap_as_its_nodes_grow(meter: Callable[..., Meter]) -> None:
    model = meter("qwen3", "plain")
    example = EXAMPLES[1]
    ((full, sliding),) = nlls(model, [example], [(FULL,) * LAYERS, (SLIDING,) * LAYERS])
    errors = []
    for nodes in (2, 8, 32, 128):
        weights = [(node + 0.5) / nodes for node in range(nodes)]
        sums = [
            sum(model.gate_gradients([example], weight, ignore)[0].by_layer) for weight in weights
        ]
        errors.append(abs(sum(sums) / nodes - (full - sliding)))
    assert errors[-1] < 1e-4 * abs(full - sliding)
    # Midpoints: four times the nodes, a sixteenth of the error.
    assert errors[3] < errors[2] / 8 < errors[1] / 16
    (scores,) = SCORERS["path-integral"].measure(model, [example], range(LAYERS), ignore)
    assert scores.full == pytest.approx(full, abs=1e-9)
    total = sum(score or 0.0 for score in scores.scores)
    assert abs(total - (sliding - full)) == pytest.approx(errors[1], rel=1e-3)


def test_memory_of_the_way_down_is_given_back(meter: Callable[..., Meter]) -> None:
    """A layer's input is kept for its own way down, and then no more; no graph stays behind."""
    import gc

    model = meter("qwen3", "plain")

    def floats() -> int:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return sum(tensor.numel() for tensor in found)

    model.gate_gradients(EXAMPLES, 0.5, ignore)
    before = floats()
    model.gate_gradients(EXAMPLES, 0.5, ignore)
    assert floats() == before
