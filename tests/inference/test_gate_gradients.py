"""Derivatives by the gates, against attention that mixes both kinds under written-down masks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface

from converter.calibration.selectors import scorer_of
from converter.inference.example import Example
from converter.inference.gate_gradients import GateGradientPass, Gates
from converter.inference.load import Placement
from converter.inference.runner import ModelRunner
from converter.inference.waiting import ActivationStore
from converter.model.mask import FULL, SLIDING, Mask
from converter.plan.units import Units
from tests.brute_force import EagerModel, Rule, attention
from tests.conftest import LAYERS, MORE_FAMILIES, Folders, Models
from tests.inference.conftest import Runners, assert_close, floats_left_by
from tests.runners import EXAMPLES, MASKS, example_of, ignore, nlls, resident, streamed

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
    """Both kinds by plain softmax, each head mixed by its layer's or its KV head's gate."""
    full, sliding = (
        attention(query, key, value, seen[kind][None], scaling) for kind in (FULL, SLIDING)
    )
    heads, row = query.shape[1], gates[module.layer_idx]
    gate = torch.stack([row[head * len(row) // heads] for head in range(heads)])
    return sliding + gate[:, None] * (full - sliding), None


AttentionInterface.register(NAME, mixed_attention)


class Mixed(EagerModel):
    """The source in transformers' own class, with gates; nothing of `converter` is used."""

    def run(self, example: Example, mask: Mask, gates: torch.Tensor) -> Any:
        """What transformers gives for all rows."""
        ids = [*example.prompt, *example.answer[:-1]]
        prompt, rows = len(example.prompt), range(len(ids))
        generated = prompt if mask.full_attention_decode else None
        sliding = Rule(mask.window_tokens, mask.sink_tokens, generated)
        seen = {
            kind: rule.matrix(rows, rows, [0] * len(ids))
            for kind, rule in ((FULL, Rule(None)), (SLIDING, sliding))
        }
        options = {"use_cache": False, "output_hidden_states": True}
        return self.model(torch.tensor([ids]), gates=gates, seen=seen, **options)

    def loss(self, example: Example, mask: Mask, gates: torch.Tensor) -> torch.Tensor:
        """Mean answer NLL; gates are (layers, 1) or (layers, kv_heads)."""
        logits = self.run(example, mask, gates).logits[0]
        answer = torch.tensor(example.answer)
        return torch.nn.functional.cross_entropy(logits[len(example.prompt) - 1 :], answer)

    def distance(self, example: Example, mask: Mask, gates: torch.Tensor) -> torch.Tensor:
        """Mean squared difference, to the full model, of what the head reads for the answer."""
        # The last of transformers' hidden states is normed.
        found, full = (
            self.run(example, mask, g).hidden_states[-1][0, len(example.prompt) - 1 :]
            for g in (gates, torch.ones(LAYERS, 1, dtype=torch.float64))
        )
        return ((found - full.detach()) ** 2).sum() / full.numel()


@pytest.fixture(scope="module")
def mixed(folder: Folders) -> Models:
    return cache(lambda family: Mixed(folder(family), attention=NAME))


def shared(weight: float) -> Gates:
    return ((weight,),) * LAYERS


# Shared within a layer and not; some layers and some heads at either end, which are run otherwise.
GATES: dict[str, Gates] = {
    "layers": ((0.3,), (0.0,), (1.0,), (0.8,)),
    "heads": ((0.0, 0.6), (1.0, 1.0), (0.4, 1.0), (0.0, 0.0)),
    "sliding at the top": ((0.5, 0.2), (1.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
    "all sliding": ((0.0, 0.0),) * LAYERS,
    "all full": ((1.0,),) * LAYERS,
}


def slopes(
    ours: ModelRunner, model: Mixed, example: Example, gates: Gates, *, hidden: bool = False
) -> list[float]:
    """Each layer's largest derivative, once ours are those that torch finds through everything."""
    targets = ours.full_states([example], ignore) if hidden else None
    (found,) = ours.gate_gradients([example], gates, ignore, targets)
    weights = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
    loss = (model.distance if hidden else model.loss)(example, ours.mask, weights)
    (expected,) = torch.autograd.grad(loss, weights)
    assert found.loss == pytest.approx(float(loss.detach()), abs=1e-9)
    assert_close(found.by_gate, expected, 1e-9)
    assert_close([sum(row) for row in found.by_gate], expected.sum(dim=1), 1e-9)
    if hidden and gates == GATES["all full"]:
        assert found.loss == 0
        assert set(found.by_gate) == {(0.0,)}
    return list(expected.abs().amax(dim=1).tolist())


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("mask", MASKS)
def test_the_derivative_is_that_of_mixed_attention(
    mask: str, weight: float, mixed: Models, runner: Runners
) -> None:
    for example in EXAMPLES[:2]:
        found = slopes(runner("qwen3", mask), mixed("qwen3"), example, shared(weight))
        assert (max(found) > 1e-2) is (mask != "longer than the prompt")


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_derivative_is_the_slope_of_the_loss(
    weight: float, mixed: Models, runner: Runners
) -> None:
    """Central differences: no derivative is taken by anyone but us."""
    example, mask, step = EXAMPLES[1], MASKS["sinks"], 1e-5
    (found,) = runner("llama", "sinks").gate_gradients([example], shared(weight), ignore)
    model = mixed("llama")
    gates = torch.full((LAYERS, 1), weight, dtype=torch.float64)
    for layer, slope in enumerate(found.slopes):
        move = step * torch.eye(LAYERS, dtype=torch.float64)[:, [layer]]
        with torch.no_grad():
            above, below = (float(model.loss(example, mask, gates + s * move)) for s in (1, -1))
        assert slope == pytest.approx((above - below) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mask", ["plain", "sinks", "sinks and full decode"])
@pytest.mark.parametrize("hidden", [False, True], ids=["nll", "hidden"])
def test_every_gate_has_its_own_derivative(
    hidden: bool, mask: str, gates: str, mixed: Models, runner: Runners
) -> None:
    ours, model = runner("qwen3", mask), mixed("qwen3")
    found = slopes(ours, model, EXAMPLES[1], GATES[gates], hidden=hidden)
    assert (min(found) > 1e-4) is not (hidden and gates == "all full")


def test_nothing_separates_the_full_model_from_itself(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Also in single precision, by every head, layer by layer and with states on disk."""
    weights = ((1.0, 1.0),) * LAYERS
    mask, single = MASKS["sinks"], Placement("cpu", "float32")
    places = (None, tmp_path / "waiting")
    readers = [streamed(sources["qwen2"], mask, single, place) for place in places]
    for model in (resident(sources["qwen2"], mask, single), *readers):
        targets = model.full_states(EXAMPLES, ignore)
        assert [len(target) for target in targets] == [len(e.answer) for e in EXAMPLES]
        for found in model.gate_gradients(EXAMPLES, weights, ignore, targets):
            assert found.loss == 0
            assert set(found.by_gate) == {(0.0, 0.0)}
    assert not list((tmp_path / "waiting").iterdir())


@pytest.mark.parametrize("offloaded", [False, True])
def test_gates_of_streamed_layers(
    offloaded: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    mask, gates = MASKS["sinks"], GATES["heads"]
    inside = resident(sources["qwen2"], mask)
    read = streamed(sources["qwen2"], mask, offload=tmp_path / "waiting" if offloaded else None)
    targets = inside.full_states(EXAMPLES, ignore)
    for left, right in zip(targets, read.full_states(EXAMPLES, ignore), strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-12)
    for given in (None, targets):
        found, expected = (m.gate_gradients(EXAMPLES, gates, ignore, given) for m in (read, inside))
        assert_close([each.loss for each in found], [each.loss for each in expected])
        assert_close([each.by_gate for each in found], [each.by_gate for each in expected])


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_every_family_has_derivatives(family: str, mixed: Models, runner: Runners) -> None:
    for weight, hidden in ((0.0, False), (0.5, False), (0.5, True)):
        slopes(runner(family), mixed(family), EXAMPLES[1], shared(weight), hidden=hidden)


def test_the_ends_are_the_uniform_plans(runner: Runners) -> None:
    examples = [*EXAMPLES, example_of(5, 2)]
    for mask in ("plain", "sinks and full decode"):
        losses = nlls(runner("qwen2", mask), examples, [(SLIDING,) * LAYERS, (FULL,) * LAYERS])
        for weight, place in ((0.0, 0), (1.0, 1)):
            found = runner("qwen2", mask).gate_gradients(examples, shared(weight), ignore)
            expected = [row[place] for row in losses]
            assert [gradients.loss for gradients in found] == pytest.approx(expected, abs=1e-9)
            # A prompt within the window: the gates mix what is equal.
            assert found[-1].slopes == pytest.approx([0.0] * LAYERS, abs=1e-12)


def test_small_effects_are_the_restore_one_scores(copy_of: Folders) -> None:
    """With values shrunk a layer's attention is a small change, and so nearly linear."""
    file = copy_of("mistral") / "model.safetensors"
    tensors = {k: t * (1e-5 if "v_proj" in k else 1) for k, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    runner = resident(file.parent, MASKS["plain"])
    layers = range(LAYERS)
    first = runner.gate_gradients(EXAMPLES, shared(0.0), ignore)
    exact = scorer_of("nll-restore").measure(runner, EXAMPLES, layers, ignore, Units(LAYERS))
    for left, right in zip(first, exact, strict=True):
        assert left.loss == pytest.approx(right.sliding, abs=1e-12)
        for slope, whole in zip(left.slopes, right.scores, strict=True):
            assert whole is not None
            assert -slope == pytest.approx(whole, rel=1e-2)
            assert abs(whole) > 1e-7


def test_a_path_integral_sums_to_the_gap_as_its_nodes_grow(runner: Runners) -> None:
    model, example = runner("qwen3", "plain"), EXAMPLES[1]
    ((full, sliding),) = nlls(model, [example], [(FULL,) * LAYERS, (SLIDING,) * LAYERS])
    errors = []
    for nodes in (2, 8, 32, 128):
        weights = [(node + 0.5) / nodes for node in range(nodes)]
        found = [model.gate_gradients([example], shared(w), ignore)[0] for w in weights]
        total = sum(sum(gradients.slopes) for gradients in found)
        errors.append(abs(total / nodes - (full - sliding)))
    assert errors[-1] < 1e-4 * abs(full - sliding)
    # Midpoints: four times the nodes, a sixteenth of the error.
    assert errors[3] < errors[2] / 8 < errors[1] / 16
    (scores,) = scorer_of("path-integral").measure(
        model, [example], range(LAYERS), ignore, Units(LAYERS)
    )
    assert scores.full == pytest.approx(full, abs=1e-9)
    total = sum(score or 0.0 for score in scores.scores)
    assert abs(total - (sliding - full)) == pytest.approx(errors[1], rel=1e-3)


def test_memory_of_the_way_back_is_given_back(runner: Runners) -> None:
    """A layer's input is kept for its own way back, and then no more; no graph stays behind."""
    model = runner("qwen3", "plain")
    model.gate_gradients(EXAMPLES, shared(0.5), ignore)
    assert floats_left_by(lambda: model.gate_gradients(EXAMPLES, shared(0.5), ignore)) == 0


def test_what_waits_for_the_way_back_are_no_views(runner: Runners) -> None:
    """Below the first row that a gradient reaches only keys are kept, above it only states."""
    store = ActivationStore()
    model, example = runner("qwen3", "plain"), EXAMPLES[2]
    forward = GateGradientPass(model._ends, example, model.mask, shared(0.5), store, "up")
    with torch.no_grad():
        for index, layer in model._modules.visit(range(LAYERS)):
            forward.forward(layer, index, returning=True)
    for index in range(LAYERS):
        for name, tensor in store.get(f"up-{index}")[0].items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, (index, name)
