"""Layers read from disk one at a time compute what the loaded model does, offloaded or not."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converter.common.errors import SourceError
from converter.inference.attention import gated_attention
from converter.inference.branches import SharedForward
from converter.inference.layers import StreamedLayers
from converter.inference.load import Placement, load_model
from converter.inference.runner import ModelRunner
from converter.inference.waiting import ActivationOffload
from converter.model.source import open_source
from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, Folders, make_model
from tests.inference.conftest import Killed, Runners, assert_close, killed
from tests.runners import EXACT, EXAMPLES, MASKS, ignore, nlls, resident, streamed, switching

CPU = torch.device("cpu")
PLANS = switching()

pytestmark = pytest.mark.usefixtures("exactly")


def gradients(runner: ModelRunner) -> list[list[float]]:
    """Losses and derivatives at the sliding end and on the way."""
    return [
        [found.loss, *found.slopes]
        for weight in (0.0, 0.5)
        for found in runner.gate_gradients((*EXAMPLES, EXAMPLES[0]), ((weight,),) * LAYERS, ignore)
    ]


def layers_of(folder: Path) -> StreamedLayers:
    source = open_source(str(folder))
    around = load_model(source, MASKS["plain"], EXACT, whole=False)
    return StreamedLayers(source, around, "cpu", torch.float64)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_family_is_read_layer_by_layer_to_the_same_weights(
    family: str, folder: Folders
) -> None:
    """Qwen2's come in shards, Qwen3's and Llama's embeddings are tied, the MoE's are packed."""
    source = open_source(str(folder(family)))
    whole = load_model(source, MASKS["plain"], EXACT).get_decoder().layers
    seen = []
    for index, layer in layers_of(folder(family)).visit(range(LAYERS)):
        expected, found = whole[index].state_dict(), layer.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert layer.self_attn.layer_idx == index
        assert not layer.training
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        seen.append(index)
    assert seen == list(range(LAYERS))


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize(
    ("family", "mask"),
    [
        *product(["qwen3", "qwen2", "qwen3_moe", "gemma"], ["plain", "sinks and full decode"]),
        *product(["qwen3"], ["sinks", "full decode"]),
    ],
)
def test_streamed_is_resident(
    family: str, mask: str, offloaded: bool, folder: Folders, runner: Runners, tmp_path: Path
) -> None:
    """Also where the same text stands among the examples twice: states are kept by what it is."""
    waiting, twice = tmp_path / "waiting", (*EXAMPLES, EXAMPLES[0])
    read = streamed(folder(family), MASKS[mask], offload=waiting if offloaded else None)
    for found_by in (lambda model: nlls(model, twice, PLANS), gradients):
        assert_close(found_by(read), found_by(runner(family, mask)))
        assert not offloaded or not list(waiting.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_weights_are_read_in_the_dtype_asked_for(dtype: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "llama")
    weights = folder / "model.safetensors"
    stored = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(stored, weights, {"format": "pt"})
    placement = Placement("cpu", dtype)
    _, layer = next(iter(streamed(folder, MASKS["plain"], placement)._modules.visit([0])))
    assert {parameter.dtype for parameter in layer.parameters()} == {getattr(torch, dtype)}
    inside, read = (
        nlls(make(folder, MASKS["plain"], placement).one_by_one(), EXAMPLES, PLANS)
        for make in (resident, streamed)
    )
    assert_close(inside, read, 1e-5 if dtype == "float32" else 0.2)


def test_what_old_checkpoints_hold_beside_the_parameters_is_not_read(copy_of: Folders) -> None:
    folder = copy_of("llama")
    before = nlls(streamed(folder, MASKS["plain"]), EXAMPLES[:1], PLANS)
    weights = folder / "model.safetensors"
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(LAYERS)
    }
    save_file(load_file(weights) | frequencies, weights, {"format": "pt"})
    assert_close(nlls(streamed(folder, MASKS["plain"]), EXAMPLES[:1], PLANS), before)


def test_tensors_that_do_not_fit_are_refused_by_name(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the family's table and transformers' class disagree, nothing is left uninitialised."""
    layers, read = layers_of(sources["qwen3"]), StreamedLayers._read

    def less(self: StreamedLayers, index: int) -> dict[str, torch.Tensor]:
        found = read(self, index)
        del found["self_attn.q_norm.weight"]
        return found

    monkeypatch.setattr(StreamedLayers, "_read", less)
    with pytest.raises(SourceError, match="layer 0 do not fit") as caught:
        list(layers.visit(range(LAYERS)))
    assert "q_norm" in caught.value.details["got"]


def test_layers_come_in_the_order_asked_for_and_only_two_are_read(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one at work and the one that comes next: reading ahead goes no further."""
    layers = layers_of(sources["mistral"])
    asked: list[int] = []
    read = StreamedLayers._read

    def noted(self: StreamedLayers, index: int) -> dict[str, torch.Tensor]:
        asked.append(index)
        return read(self, index)

    monkeypatch.setattr(StreamedLayers, "_read", noted)
    order = [3, 2, 0]
    for place, (index, _) in enumerate(layers.visit(order)):
        assert index == order[place]
        assert len(asked) <= place + 2
    assert asked == order
    assert list(layers.visit([])) == []


def test_the_error_of_the_reading_thread_reaches_the_caller(copy_of: Folders) -> None:
    folder = copy_of("mistral")
    runner = streamed(folder, MASKS["plain"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="a file of the model changed") as caught:
        nlls(runner, EXAMPLES[:1], PLANS)
    assert caught.value.details["got"] == "no such file"


@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_an_offloaded_pass_that_is_killed_goes_on_to_the_same_answers(
    step: int, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three examples through four layers, killed before one of the twelve steps."""
    whole, done = list[float](), list[float]()
    inside = streamed(sources["qwen3"], MASKS["sinks"]).answers(EXAMPLES, PLANS, whole.append)
    advance, steps = SharedForward.run_layer, [0]

    def fails(self: SharedForward, *arguments: object) -> object:
        steps[0] += 1
        if steps[0] == step:
            raise Killed
        return advance(self, *arguments)  # type: ignore[arg-type]

    runner = streamed(sources["qwen3"], MASKS["sinks"], offload=tmp_path / "waiting")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SharedForward, "run_layer", fails)
        nlls(runner, EXAMPLES, PLANS)
    # A new process, as far as anything is kept.
    again = streamed(sources["qwen3"], MASKS["sinks"], offload=tmp_path / "waiting")
    found = again.answers(EXAMPLES, PLANS, done.append)
    assert_close(*([[answer.nll for answer in row] for row in way] for way in (found, inside)))
    # What had been done was not done again.
    assert len(done) == len(whole) - (step - 1)
    assert list((tmp_path / "waiting").iterdir()) == []


def test_states_of_other_plans_or_examples_are_not_taken_for_ours(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = MASKS["plain"]
    runner = streamed(sources["qwen3"], mask, offload=tmp_path / "waiting")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ActivationOffload, "drop", killed)
        nlls(runner, EXAMPLES[:2], PLANS)
    left = len(list((tmp_path / "waiting").iterdir()))
    assert left == 2
    expected = streamed(sources["qwen3"], mask)
    for examples, plans in ((EXAMPLES[:2], PLANS[::-1]), (EXAMPLES[2:], PLANS)):
        assert_close(nlls(runner, examples, plans), nlls(expected, examples, plans))
    assert len(list((tmp_path / "waiting").iterdir())) == left


def test_an_offload_writes_whole_files_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = ActivationOffload(tmp_path / "a" / "b", CPU)
    first = {"hidden": torch.arange(6.0).reshape(2, 3)}
    offload.put("x", first, {"layer": "1"})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", killed)
        offload.put("x", {"hidden": torch.zeros(1)}, {"layer": "2"})
    tensors, note = ActivationOffload(tmp_path / "a" / "b", CPU).get("x")
    assert torch.equal(tensors["hidden"], first["hidden"])
    assert note == {"layer": "1"} == offload.note("x")
    offload.drop("x")
    offload.drop("x")
    assert offload.note("x") is None


def test_shards_are_read_where_the_index_puts_them(sources: dict[str, Path]) -> None:
    """A layer may lie in two shards."""
    folder, layers = sources["qwen2"], layers_of(sources["qwen2"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards: dict[int, set[str]] = {}
    for layer in range(LAYERS):
        for suffix, tensor in layers._read(layer).items():
            name = f"model.layers.{layer}.{suffix}"
            shards.setdefault(layer, set()).add(index[name])
            with safe_open(folder / index[name], framework="pt") as file:
                assert_close(tensor, file.get_tensor(name).double(), 0)
    assert any(len(spread) > 1 for spread in shards.values())


def test_a_runner_without_an_offload_folder_leaves_no_file(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nlls(streamed(sources["qwen3"], MASKS["plain"]), EXAMPLES[:1], PLANS[:2])
    assert list(tmp_path.iterdir()) == []


def test_a_gate_may_be_on_another_device_than_its_layer() -> None:
    """As where a model is spread: the gate stands with the layer's input.

    torch's device without memory stands for the second one: it refuses to be mixed with others.
    """

    def attention(*_: object) -> tuple[torch.Tensor, None]:
        return torch.ones(1, 3, 4, 8, device="meta"), None

    output, _ = gated_attention(attention, attention, torch.tensor([0.25, 0.75]))()
    assert (output.device.type, output.shape) == ("meta", (1, 3, 4, 8))
