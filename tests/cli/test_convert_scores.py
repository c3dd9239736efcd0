"""The measured numbers, against the source's own eager code under explicit masks."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.calibration.calibrate import calibrate
from converter.calibration.selectors import scorer_of
from converter.inference.example import Example
from converter.inference.load import resolve_placement
from converter.model.mask import Mask
from converter.plan.plan import layer_types_of
from converter.plan.units import Units
from tests.brute_force import FULL, SLIDING, EagerModel
from tests.conftest import LAYERS, run_cli
from tests.runners import ignore, run, scoring, silent

WINDOW = 24
MASKS: dict[str, tuple[tuple[object, ...], dict[str, int]]] = {
    "plain": ((), {}),
    "sinks": (("--sinks", 3), {"sinks": 3}),
    "full decode": (("--sinks", 2, "--full-decode"), {"sinks": 2}),
}


def make_rows() -> dict[int, tuple[str, str]]:
    """Prompts and answers in the test tokenizer's bytes, by the tokens of the prompt."""
    generator = random.Random(5)  # noqa: S311 - a reproducible text, not a secret
    letters = "abcdefghijklmnopqrstuvwxyz "
    rows = {}
    for prompt_tokens, answer_tokens in ((60, 1), (130, 7), (200, 12), (261, 4)):
        prompt = "".join(generator.choice(letters) for _ in range(prompt_tokens - 1)) + "."
        rows[prompt_tokens] = (prompt, " " + "".join(generator.choices(letters, k=answer_tokens)))
    return rows


ROWS = make_rows()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in ROWS.values()]
    path.write_text("\n".join(lines) + "\n")
    return path


def nll_by_hand(
    model: EagerModel, ids: tuple[list[int], ...], layer_types: list[str], mask: dict[str, int]
) -> float:
    prompt, answer = ids
    logits = model.logits([*prompt, *answer], layer_types, WINDOW, **mask).double()
    rows = logits[len(prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(rows, torch.tensor(answer)))


@pytest.mark.parametrize("method", ["nll-restore", "nll-remove"])
@pytest.mark.parametrize(
    ("family", "mask"),
    [("qwen3", "plain"), ("qwen2", "sinks"), ("llama", "full decode"), ("mistral", "plain")],
)
def test_scores_are_differences_of_answer_losses(
    family: str,
    mask: str,
    method: str,
    data: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoTokenizer

    options, by_hand = MASKS[mask]
    out = tmp_path / "scores.json"
    data_options = ("--data", data, "--samples", len(ROWS), "--window", WINDOW)
    arguments = (*data_options, "--dtype", "float32", "--out", out, "--method", method, *options)
    assert run_cli("calibrate", sources[family], *arguments, "--json", "-q") == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(out.read_text())
    assert printed.pop("seconds") > 0
    assert printed.pop("agreement") is None, "there is one kind of examples"
    assert {k: v for k, v in written.items() if k != "per_example"} == printed

    tokenizer = AutoTokenizer.from_pretrained(sources[family])
    model = EagerModel(sources[family], torch.float32)
    restores = method == "nll-restore"
    others, switched, sign = (SLIDING, FULL, 1) if restores else (FULL, SLIDING, -1)
    scores: list[list[float]] = [[] for _ in range(LAYERS)]
    assert sorted(record["prompt_tokens"] for record in written["per_example"]) == sorted(ROWS)
    for record in written["per_example"]:
        prompt, answer = ROWS[record["prompt_tokens"]]
        ids = (tokenizer.encode(prompt), tokenizer.encode(answer))
        assert record["answer_tokens"] == len(ids[1])
        seen: dict[str, Any] = dict(by_hand)
        if mask == "full decode":
            seen["generated_from"] = len(ids[0])
        measured, other = ("sliding", "full") if restores else ("full", "sliding")
        uniform = nll_by_hand(model, ids, [others] * LAYERS, seen)
        assert record[measured] == pytest.approx(uniform, abs=1e-5)
        assert record[other] is None
        for layer in range(LAYERS):
            kinds = [switched if i == layer else others for i in range(LAYERS)]
            loss = nll_by_hand(model, ids, kinds, seen)
            scores[layer].append(sign * (uniform - loss))
            assert record["scores"][layer] == pytest.approx(scores[layer][-1], abs=1e-5)
    for layer, values in zip(written["layers"], scores, strict=True):
        assert layer["score"] == pytest.approx(statistics.mean(values), abs=1e-5)
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert layer["stderr"] == pytest.approx(error, abs=1e-5)
        assert error > 1e-3, "the test would see nothing if sliding changed nothing"


@pytest.mark.parametrize("method", ["nll-restore", "nll-remove", "kl", "path-integral"])
def test_within_the_window_every_layer_is_worth_exactly_nothing(
    method: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Such examples are filtered out; here they are handed over past the filter."""
    window, placement = 150, resolve_placement("cpu", "float32")
    prompts = [tuple(range(3, 3 + tokens)) for tokens in (5, 100, window - 2)]
    examples = [Example(prompt, (7, 8, 9), "data") for prompt in prompts]
    measured = run(sources["qwen2"], examples, Mask(window), tmp_path / "work", placement=placement)
    runner, _ = measured.runner(False)
    # One plan at a time, as the null control does it: a batch of several may round otherwise.
    found = scorer_of(method).measure(
        runner.one_by_one(), examples, range(LAYERS), ignore, Units(LAYERS)
    )
    for scores in found:
        assert scores.scores == (0.0,) * LAYERS
        assert None in (scores.full, scores.sliding) or scores.full == scores.sliding
    together = calibrate(measured, scoring(method), silent).scores
    assert [score.mean for score in together.estimates] == pytest.approx([0.0] * LAYERS, abs=1e-6)


def test_held_out_quality_is_that_of_the_checkpoint_that_is_written(
    data: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    counts = ("--samples", 2, "--holdout", 2, "--window", WINDOW, "--budget", 2)
    options = ("--data", data, *counts, "--method", "nll-restore", "--no-verify", "-q")
    assert run_cli("convert", sources["mistral"], out, *options) == 0
    quality = json.loads((out / "hybrid" / "quality.json").read_text())
    scored = json.loads((out / "hybrid" / "scores.json").read_text())["per_example"]
    held_out = ROWS.keys() - {example["prompt_tokens"] for example in scored}
    tokenizer = AutoTokenizer.from_pretrained(sources["mistral"])
    model = EagerModel(sources["mistral"], torch.float32)
    texts = [[tokenizer.encode(text) for text in ROWS[tokens]] for tokens in sorted(held_out)]
    for outcome in quality["outcomes"]:
        kinds = list(layer_types_of(outcome["full_attention_layers"], LAYERS))
        by_hand = [nll_by_hand(model, (prompt, answer), kinds, {}) for prompt, answer in texts]
        assert sorted(outcome["per_example"]["nll"]) == pytest.approx(sorted(by_hand), abs=1e-5)
        assert outcome["nll"]["mean"] == pytest.approx(statistics.mean(by_hand), abs=1e-5)
    plan = json.loads((out / "hybrid" / "plan.json").read_text())
    assert quality["outcomes"][1]["full_attention_layers"] == plan["full_attention_layers"]
