"""The checkpoints that tests of several files run, and how they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.brute_force import FULL, SLIDING
from tests.conftest import FAMILIES, LAYERS, run_cli

WINDOW, SINKS = 24, 3
# Full attention stays in layers 1 and 2: layer 0 and the last one slide.
KEPT = (1, 2)
PLAN = [FULL if layer in KEPT else SLIDING for layer in range(LAYERS)]
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"sinks": SINKS},
    "full decode": {"full_decode": True},
    "sinks and full decode": {"sinks": SINKS, "full_decode": True},
}
NEW = 14
# Two loads of the same model may still add in another order: where memory is aligned otherwise.
EQUAL = 1e-12
EVERY = [(family, mask) for family in FAMILIES for mask in MASKS]


def load(folder: Path, **options: Any) -> Any:
    """The checkpoint through its own code, in float64 if nothing else is said."""
    given = {"trust_remote_code": True, "dtype": torch.float64, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(folder, **(given | options)).eval()


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


PROMPT = random_ids(150)
# Repetition, for prompt lookup to find something in.
REPEATING = random_ids(30, seed=3) * 5


def rule(mask: str, prompt_tokens: int) -> dict[str, Any]:
    """The mask as the brute force takes it."""
    options = MASKS[mask]
    return {
        "window": WINDOW,
        "sinks": options.get("sinks", 0),
        "generated_from": prompt_tokens if options.get("full_decode") else None,
    }


def generate(model: Any, prompt: list[int], **options: Any) -> list[int]:
    return generate_batch(model, torch.tensor([prompt]), **options)[0]


def generate_batch(model: Any, batch: torch.Tensor, padding: int = 0, **options: Any) -> Any:
    """New tokens of prompts of one length, the last of them padded on the left."""
    real = torch.ones_like(batch)
    real[-1, :padding] = 0
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    output = model.generate(batch, attention_mask=real, pad_token_id=0, **(settings | options))
    return output[:, batch.shape[1] :].tolist()


def convert(
    source: Path, out: Path, mask: str, layers: tuple[int, ...] = KEPT, window: int = WINDOW
) -> Path:
    """A checkpoint of a source by `hybridize convert --layers`."""
    options = MASKS[mask]
    arguments: list[object] = ["--layers", ",".join(map(str, layers)), "--window", window]
    arguments += ["--sinks", options["sinks"]] if "sinks" in options else []
    arguments += ["--full-decode"] if "full_decode" in options else []
    assert run_cli("convert", source, out, *arguments, "-q") == 0
    return out
