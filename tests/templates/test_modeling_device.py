"""Where the shipped code makes its tensors, and when it waits for them, on a stand-in for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device

from tests.brute_force import FULL, SLIDING
from tests.conftest import LAYERS
from tests.far_device import DEVICE, far, far_device, move, near
from tests.hybrids import MASKS, load, random_ids
from tests.kv_heads import KINDS, KV_HEADS, checkpoint_by_heads, grouped_model, mask_of
from tests.runners import EXAMPLES, ignore, nlls, resident
from tests.runners import MASKS as CALIBRATED
from tests.templates.cases import Case
from tests.templates.stand_in import shipped_with, taken_by

IDS, PROMPT, PADDING = torch.tensor([random_ids(200, seed=5)]), 160, 30


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_model(tmp_path_factory.mktemp("grouped") / "model")


def given(mask: str) -> dict[str, dict[str, torch.Tensor]]:
    """Plain, padded and packed inputs."""
    padding = torch.zeros_like(IDS[:, :PADDING])
    padded = torch.cat([padding, IDS], dim=1)
    real = torch.cat([padding, torch.ones_like(IDS)], dim=1)
    positions = torch.arange(IDS.shape[1])[None] % 70
    packed = {} if "full decode" in mask else {"input_ids": IDS, "position_ids": positions}
    return {
        "plain": {"input_ids": IDS},
        "padded": {"input_ids": padded, "attention_mask": real},
        "packed": packed,
    }


@torch.no_grad()
def decoded(model: Any, inputs: dict[str, torch.Tensor], waits: list[str]) -> torch.Tensor:
    """Logits of a prefill and of a token after it, and on the way there what was waited for."""
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    token = inputs["input_ids"][:, -1:]
    filled = model(**inputs, use_cache=True, prompt_length=PROMPT)
    if "attention_mask" in rest:
        rest["attention_mask"] = torch.cat([rest["attention_mask"], torch.ones_like(token)], dim=1)
    if "position_ids" in rest:
        rest["position_ids"] = rest["position_ids"][:, -1:] + 1
    waits.clear()
    after = model(token, past_key_values=filled.past_key_values, prompt_length=PROMPT, **rest)
    return torch.cat([filled.logits, after.logits], dim=1)


@pytest.mark.parametrize("flash", [False, True], ids=["blocks", "flash"])
@pytest.mark.parametrize("mask", MASKS)
def test_nothing_is_made_in_main_memory_and_no_token_is_waited_for(
    mask: str, flash: bool, grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of each kind, and mixtures; what is computed there is what is computed here."""
    model = load(checkpoint_by_heads(grouped, tmp_path / "out", mask_of(mask)))
    inputs = {name: value for name, value in given(mask).items() if value}
    expected = {name: decoded(model, value, []) for name, value in inputs.items()}
    move(model)
    if flash:
        codes = shipped_with(type(model))
        taken = taken_by(*codes, monkeypatch=monkeypatch)
        monkeypatch.setattr(codes[0], "varlen_attn", lambda *a, **o: far(taken(*near(a), **o)))
    for name, value in inputs.items():
        with far_device() as waits:
            found = near(decoded(model, far(value), waits))
        assert (found - expected[name]).abs().max() < 1e-10, name
        assert name == "padded" or not waits, name


@pytest.mark.parametrize("mask", ["plain", "sinks and full decode"])
def test_scoring_keeps_to_the_device(mask: str, grouped: Path) -> None:
    """Losses and slopes, of layers and of KV heads."""
    plans = [KINDS, (FULL,) * LAYERS, (SLIDING,) * LAYERS]
    gates = tuple(tuple(0.1 + 0.2 * head for head in range(KV_HEADS)) for _ in range(LAYERS))

    def measured(runner: Any) -> list[float]:
        losses = [one for row in nlls(runner, EXAMPLES[:2], plans) for one in row]
        slopes = runner.gate_gradients(EXAMPLES[:2], gates, ignore)
        return losses + [one for found in slopes for one in (found.loss, *found.slopes)]

    runner = resident(grouped, CALIBRATED[mask])
    expected = measured(runner)
    for module in (runner._ends._model, *runner._modules.modules):
        move(module)
    runner._ends.device = torch.device(DEVICE)
    with far_device():
        assert measured(runner) == pytest.approx(expected, rel=0, abs=1e-10)


@pytest.mark.parametrize("left", [(), (30, 0)], ids=["plain", "padded"])
def test_rows_follow_a_model_to_its_other_devices(left: tuple[int, ...]) -> None:
    """Accelerate sends what a layer is given after it; of objects, those that know how to go."""
    case = Case(rows=300, batch=2, left=left, right=(0, 100) if left else ())
    with far_device():
        rows = send_to_device(case.describe(), DEVICE)
        states = far(tuple(state.detach() for state in case.states(torch.float64)))
        found = near(case.code.hybrid_attention(case.module, *states, rows)[0])
    expected = case.found(case.states(torch.float64), None)
    assert (found - expected).abs().max() < 1e-10
