"""Real small models and real text, where they lie beside the checkout."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from converter.calibration.calibrate import calibrate
from converter.calibration.data.examples import load_examples
from converter.calibration.data.settings import DataSettings
from converter.inference.load import resolve_placement
from converter.inference.tokenizer import load_tokenizer
from converter.model.mask import Mask
from tests.cli.test_convert import read, run_json
from tests.conftest import run_cli, shared
from tests.runners import run, scoring, silent

pytestmark = pytest.mark.shared

# Of each: the model_type of a plain-window checkpoint.
MODELS = {
    "stories260K": "mistral",
    "stories260K-qwen2": "qwen2",
    "stories260K-mistral": "mistral",
    "stories3M-qwen3": "qwen3",
}
WINDOW = 32


def stories(path: Path, *, count: int) -> Path:
    """Continuations of real stories as rows: the first part is the prompt, the rest the answer."""
    text = shared("texts/tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
    pieces = text.replace("\r\n", "\n").split("<|endoftext|>")
    random.Random(1).shuffle(pieces)  # noqa: S311 - a reproducible order, not a secret
    stories = [words for piece in pieces if 80 <= len(words := piece.split()) <= 120]
    rows = [{"prompt": " ".join(w[:60]), "answer": " ".join(w[60:80])} for w in stories]
    assert len(rows) > 2 * count
    path.write_text("\n".join(json.dumps(row) for row in rows[: 2 * count]) + "\n")
    return path


@pytest.mark.parametrize("model", MODELS)
def test_real_models_convert_and_verify_on_recall_over_real_text(
    model: str, tmp_path: Path
) -> None:
    source, out = shared(f"models/{model}"), tmp_path / "out"
    text = shared("texts/tinyshakespeare.txt")
    counts = ("--samples", 4, "--holdout", 2, "--window", WINDOW)
    printed = run_json("convert", source, out, "--data", text, *counts)
    assert printed["verification"]["ok"] is True
    assert read(out / "config.json")["model_type"] == MODELS[model]
    assert read(out / "hybrid" / "scores.json")["examples"] == 4
    assert (out / "model.safetensors").samefile(source / "model.safetensors")


# transformers reads the tokenizer of a qwen2 folder as Qwen2Tokenizer, whatever the folder says;
# that is not the one these weights were trained with.
@pytest.mark.parametrize("model", [name for name in MODELS if name != "stories260K-qwen2"])
def test_a_window_costs_real_models_the_loss_that_full_attention_restores(
    model: str, tmp_path: Path
) -> None:
    source, out = shared(f"models/{model}"), tmp_path / "out"
    rows = stories(tmp_path / "stories.jsonl", count=40)
    counts = ("--samples", 12, "--holdout", 12, "--window", 8, "--sinks", 1, "--budget", 2)
    printed = run_json("convert", source, out, "--data", rows, *counts)
    assert printed["verification"]["ok"] is True
    nll = {outcome["name"]: outcome["nll"]["mean"] for outcome in printed["quality"]["outcomes"]}
    # These models write such stories well: about 1.5 to 2 nats a token (see shared/README.md).
    assert 1.0 < nll["original"] < 2.6
    assert nll["original"] < nll["hybrid"] < nll["all sliding"]


def test_the_same_weights_under_three_architectures_score_the_same(tmp_path: Path) -> None:
    rows = stories(tmp_path / "stories.jsonl", count=6)
    mask = Mask(16, sink_tokens=1)
    settings = DataSettings(str(rows), 6, 0, 0, 480, 1, 512, 0)
    tokenizer = load_tokenizer(shared("models/stories260K"))
    examples = load_examples(tokenizer, settings, mask, 5, 512)
    scores, placement = [], resolve_placement("cpu", "float32")
    for model in ("stories260K", "stories260K-qwen2", "stories260K-mistral"):
        source, work = shared(f"models/{model}"), tmp_path / model
        measured = run(source, examples.scored, mask, work, placement=placement)
        scores.append(calibrate(measured, scoring("nll-remove"), silent).scores.examples)
    assert len(scores[0]) == 6
    for other in scores[1:]:
        for left, right in zip(scores[0], other, strict=True):
            assert left.scores == pytest.approx(right.scores, abs=1e-5)
            assert left.full == pytest.approx(right.full, abs=1e-5)
            assert left.full != pytest.approx(left.sliding, abs=1e-3)


def test_a_real_model_verifies_in_float32(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = shared("models/stories3M-qwen3")
    run_json("convert", source, out, "--layers", "1,4", "--window", WINDOW, "--sinks", 2)
    assert run_cli("verify", out, "--dtype", "float32", "--against", source) == 0
