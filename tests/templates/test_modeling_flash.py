"""The calls of flash attention that ship, through a stand-in for torch's function.

torch's own, `torch.nn.attention.varlen.varlen_attn`, has CUDA alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.brute_force import FULL, SLIDING, EagerModel
from tests.conftest import LAYERS
from tests.hybrids import MASKS, load, random_ids, rule
from tests.kv_heads import KINDS, KV_HEADS, checkpoint_by_heads, grouped_model, mask_of
from tests.runners import EXAMPLES, ignore, nlls, resident
from tests.runners import MASKS as CALIBRATED
from tests.templates.cases import HYBRID, KERNELS, Case, cases, compare, packed_cases
from tests.templates.stand_in import StandIn, shipped_with, taken_by

# Fixtures are the same for all examples.
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Flash attention for all that would take it on a GPU, but in any dtype."""
    return taken_by(KERNELS, HYBRID, monkeypatch=monkeypatch)


def test_the_stand_in_takes_what_torch_does() -> None:
    """Every argument that it has, torch's function has, by the same name and default."""
    theirs = signature(pytest.importorskip("torch.nn.attention.varlen").varlen_attn).parameters
    for name, parameter in signature(StandIn()).parameters.items():
        assert theirs[name].kind == parameter.kind, name
        if parameter.kind == Parameter.KEYWORD_ONLY:
            assert theirs[name].default == parameter.default, name


@pytest.mark.usefixtures("flash")
@settings(max_examples=400, **SETTINGS)
@given(case=cases())
def test_every_mask_is_the_brute_force(case: Case) -> None:
    compare(case, torch.float64)


@pytest.mark.usefixtures("flash")
@settings(max_examples=150, **SETTINGS)
@given(case=cases().map(lambda case: replace(case, left=(), right=())))
def test_gradients_are_those_of_the_brute_force(case: Case) -> None:
    """Sinks, too: what merges log-sum-exps passes no gradient, and is not used for any."""
    compare(case, torch.float64, gradients=True)


@settings(max_examples=80, **SETTINGS)
@given(case=cases().map(lambda case: replace(case, left=(), right=())))
def test_the_first_release_is_given_keys_for_every_query_head(
    case: Case, flash: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its documentation it has one number of heads for queries, keys and values."""
    monkeypatch.setattr(KERNELS, "TORCH", Version("2.11.0+cu130"))
    monkeypatch.setattr(KERNELS, "varlen_attn", partial(flash, enable_gqa=False))
    compare(case, torch.float64, gradients=True)


@pytest.mark.usefixtures("flash")
@settings(max_examples=80, **SETTINGS)
@given(case=packed_cases())
def test_packed_sequences_never_see_each_other(case: Case) -> None:
    compare(case, torch.float64, gradients=True)


@pytest.mark.parametrize(
    ("case", "calls"),
    [
        (Case(rows=300), 1),
        (Case(rows=300, kind="full_attention"), 1),
        (Case(rows=300, cached=200, kind="full_attention"), 1),
        (Case(rows=300, cached=200, forget=True), 1),
        (Case(rows=300, batch=2, left=(0, 70), right=(3, 0)), 1),
        (Case(rows=300, packed=((100, 150, 50),)), 1),
        (Case(rows=300, sinks=3), 2),
        (Case(rows=300, cached=200, sinks=3), 2),
        (Case(rows=300, batch=2, sinks=3, left=(0, 70), right=(0, 0)), 2),
        (Case(rows=300, full_attention_decode=True, prompt_length=200), 2),
        (Case(rows=300, sinks=3, full_attention_decode=True, prompt_length=200), 3),
        (Case(rows=1, cached=200, batch=2, left=(0, 70), right=(0, 0)), 1),
        # A single row that sees all keys at hand needs no flash attention.
        (Case(rows=1, cached=200, forget=True), 0),
        (Case(rows=1, cached=200, kind="full_attention"), 0),
    ],
)
def test_calls_of_a_layer(case: Case, calls: int, flash: StandIn) -> None:
    with torch.no_grad():
        compare(case, torch.float64)
    assert flash.calls == calls


@pytest.mark.usefixtures("flash")
@settings(max_examples=100, **SETTINGS)
@given(case=cases(), length=st.integers(1, 400))
def test_without_gradients_sinks_are_merged_exactly(case: Case, length: int) -> None:
    sinks = replace(case, sinks=max(case.sinks, 1), rows=length, left=(), right=())
    with torch.no_grad():
        compare(sinks, torch.float64)
        if case.batch == 2 and length > 40:
            compare(replace(sinks, left=(length // 3, 5), right=(0, 2)), torch.float64)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "torch_version", "taken"),
    [
        ((8, 0), torch.bfloat16, 128, "2.11.0+cu130", True),
        ((9, 0), torch.float16, 256, "2.13.0+cu130", True),
        ((12, 0), torch.bfloat16, 64, "3.0.1", True),
        # Turing; single precision; a head too large; one of no multiple of 8; torch too old.
        ((7, 5), torch.float16, 128, "2.13.0", False),
        ((9, 0), torch.float32, 128, "2.13.0", False),
        ((9, 0), torch.bfloat16, 264, "2.13.0", False),
        ((9, 0), torch.bfloat16, 84, "2.13.0", False),
        ((9, 0), torch.bfloat16, 128, "2.10.2", False),
    ],
)
def test_flash_is_chosen_where_it_is_to_be_had(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, torch_version: str, taken: bool
) -> None:
    assert KERNELS.has_flash(capability, dtype, head_dim, Version(torch_version)) is taken


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_model(tmp_path_factory.mktemp("grouped") / "model")


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("mask", MASKS)
def test_kv_heads_of_a_checkpoint_go_through_flash(
    mask: str, grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, in chunks behind a cache, and beside left padding."""
    hybrid = load(checkpoint_by_heads(grouped, tmp_path / "out", mask_of(mask)))
    taken = taken_by(*shipped_with(type(hybrid)), monkeypatch=monkeypatch)
    ids, prompt, padding = random_ids(200, seed=5), 160, 30
    expected = EagerModel(grouped).logits(ids, KINDS, **rule(mask, prompt))
    cached, found = None, list[torch.Tensor]()
    with torch.inference_mode():
        whole = hybrid(torch.tensor([ids]), use_cache=False, prompt_length=prompt).logits[0]
        for piece in torch.tensor([ids]).split([1, 40, 100, 58, 1], dim=1):
            output = hybrid(piece, past_key_values=cached, prompt_length=prompt)
            cached = output.past_key_values
            found.append(output.logits[0])
        padded = hybrid(
            torch.tensor([[0] * padding + ids]),
            attention_mask=torch.tensor([[0] * padding + [1] * len(ids)]),
            position_ids=torch.tensor([[0] * padding + [*range(len(ids))]]),
            use_cache=False,
            prompt_length=padding + prompt,
        )
    for logits in (whole, torch.cat(found), padded.logits[0, padding:]):
        assert (logits - expected).abs().max() < 1e-10
    # Two layers are mixtures, of two calls each.
    assert taken.calls >= 3 * (len(KINDS) + 2)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("mask", sorted(CALIBRATED))
def test_scoring_goes_through_flash(
    mask: str, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and slopes of layers and of KV heads are those of the other kernels."""
    runner = resident(grouped, CALIBRATED[mask])
    plans = [KINDS, (FULL,) * LAYERS, (SLIDING,) * LAYERS]
    gates = tuple(tuple(0.1 + 0.2 * head for head in range(KV_HEADS)) for _ in range(LAYERS))

    def measured() -> list[float]:
        losses = [one for row in nlls(runner, EXAMPLES, plans) for one in row]
        slopes = runner.gate_gradients(EXAMPLES, gates, ignore)
        return losses + [one for found in slopes for one in (found.loss, *found.slopes)]

    expected = measured()
    taken = taken_by(*shipped_with(runner._ends._attention), monkeypatch=monkeypatch)
    assert measured() == pytest.approx(expected, rel=0, abs=1e-10)
    assert taken.calls > 0


def test_other_devices_and_dropout_take_other_ways() -> None:
    query = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    assert not KERNELS.takes_flash(query, KERNELS.Options(None, 0.0))
    assert not KERNELS.takes_flash(query.to("meta"), KERNELS.Options(None, 0.0))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=st.one_of(cases(), packed_cases()))
def test_cuda_never_falls_to_the_slow_kernel(dtype: torch.dtype, case: Case) -> None:
    """With torch's own functions, whichever way is chosen; and what they give is the definition."""
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fast), torch.no_grad():
        compare(replace(case, head_dim=64), dtype, device="cuda")
