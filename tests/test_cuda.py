"""What holds on a CPU holds on a GPU; `make bench-gpu` runs these, and all are skipped without one.

References are computed on the CPU in float64, most of them by brute force.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from converter.checkpoint.verify import place
from converter.checkpoint.verify.checks import TOLERANCE, verify
from tests.brute_force import FULL
from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, Folders
from tests.hybrids import EVERY, MASKS, PLAN, convert, load, random_ids, rule
from tests.kv_heads import checkpoint_by_heads, kinds_in, mask_of

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
IDS = random_ids(300)
# Tokens of them that are the prompt.
PROMPT = 280
# All that computes attention without writing its scores down.
FAST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

Models = Callable[[str], Any]


def on_device(checkpoint: Path, dtype: torch.dtype) -> Callable[..., Any]:
    """A checkpoint on the GPU, told where the prompt ends."""
    return partial(load(checkpoint, dtype=dtype).to(DEVICE), prompt_length=PROMPT)


@torch.inference_mode()
def logits(model: Callable[..., Any]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of the text, on the CPU in float64."""
    output = model(input_ids=torch.tensor([IDS], device=DEVICE), use_cache=False)
    return output.logits[0].double().cpu()  # type: ignore[no-any-return]


def source_in_half(folder: Path) -> torch.Tensor:
    """Logits of an unmodified source in bfloat16 on the GPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(DEVICE)
    return logits(model)


def gradient(model: Callable[..., Any], embedding: Any) -> torch.Tensor:
    """Of a weighted sum of logits, by what the first layer reads: (tokens, hidden)."""
    read = embedding(torch.tensor([IDS], device=embedding.weight.device)).detach().requires_grad_()
    output = model(inputs_embeds=read, use_cache=False).logits[0].double()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights.to(output)).sum().backward()
    assert read.grad is not None
    return read.grad[0].double().cpu()


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root mean square of a difference, as a share of what is expected."""
    return float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_every_mask_is_the_brute_force(
    family: str, mask: str, dtype: torch.dtype, checkpoint: Folders, eager: Models
) -> None:
    found = logits(on_device(checkpoint(family, mask), dtype))
    expected = eager(family).logits(IDS, PLAN, **rule(mask, PROMPT))
    limit = TOLERANCE[str(dtype).removeprefix("torch.")] * float(expected.std())
    assert float((found - expected).abs().max()) <= limit


@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_half_precision_loses_no_more_than_full_attention_does_in_it(
    family: str, mask: str, checkpoint: Folders, folder: Folders, eager: Models
) -> None:
    exact = eager(family).logits(IDS, [FULL] * LAYERS, window=1)
    expected = eager(family).logits(IDS, PLAN, **rule(mask, PROMPT))
    found = logits(on_device(checkpoint(family, mask), torch.bfloat16))
    assert far(found, expected) <= 1.5 * far(source_in_half(folder(family)), exact)
    # A plan is further from another than rounding is.
    assert far(found, expected) < 0.5 * far(exact, expected)


@pytest.mark.parametrize(("family", "mask"), EVERY)
def test_gradients_are_those_of_the_cpu(family: str, mask: str, checkpoint: Folders) -> None:
    """Which are held against brute force (tests/templates/test_modeling_attention.py)."""
    here = load(checkpoint(family, mask))
    expected = gradient(partial(here, prompt_length=PROMPT), here.get_input_embeddings())
    for dtype, limit in ((torch.float64, 1e-5), (torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        there = load(checkpoint(family, mask), dtype=dtype).to(DEVICE)
        found = gradient(partial(there, prompt_length=PROMPT), there.get_input_embeddings())
        assert far(found, expected) <= limit, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_no_layer_falls_back_to_writing_its_scores_down(
    mask: str, dtype: torch.dtype, checkpoint: Folders
) -> None:
    """Only torch's math kernel writes them down: here torch refuses where nothing else would do."""
    with sdpa_kernel(FAST):
        logits(on_device(checkpoint("qwen3", mask), dtype))


@pytest.mark.parametrize("mask", ["plain", "sinks and full decode"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_family_is_proved(family: str, mask: str, folder: Folders, tmp_path: Path) -> None:
    out = convert(folder(family), tmp_path / "out", mask)
    report = verify(out, None, device=DEVICE)
    assert report.ok, [check for check in report.checks if not check.ok]


@pytest.mark.parametrize("mask", ["plain", "sinks and full decode"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_kv_heads_are_proved_and_recurrent_layers_beside_them(
    family: str, mask: str, folder: Folders, tmp_path: Path
) -> None:
    source, out = folder(family), tmp_path / "out"
    checkpoint_by_heads(source, out, mask_of(mask), kinds_in(family))
    report = verify(out, None, device=DEVICE)
    assert report.ok, [check for check in report.checks if not check.ok]


def test_what_the_gpu_has_no_room_for_is_proved_layer_by_layer(
    checkpoint: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "free_bytes", lambda _: 0)
    report = verify(checkpoint("qwen3", "plain"), None, device=DEVICE, dtype="float32")
    assert report.ok, [check for check in report.checks if not check.ok]
