"""Controls: what they must find is found, and an engine that is wrong does not pass them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.calibrate import calibrate
from converter.calibration.diagnostics import Controls, inclusion, measure_controls, split_half
from converter.calibration.run import CalibrationRun
from converter.calibration.scores import Scores
from converter.calibration.scores_file import load_scores
from converter.common.statistics import spearman
from converter.inference import branches as forward
from converter.inference.branches import SharedForward
from converter.inference.load import Placement
from converter.inference.positions import NO_ATTENTION, LayerTypes, TokenSpans
from converter.model.mask import FULL, Mask
from converter.plan.plan import layer_types_of
from tests.conftest import DEMO, LAYERS, run_cli
from tests.runners import MASKS, Plain, example_of, run, scoring, silent

EXAMPLES = [example_of(50 + seed, 1 + seed % 3, seed) for seed in range(6)]
SINGLE = Placement("cpu", "float32")


def controlled(folder: Path, work: Path, method: str = "nll-restore", **more: Any) -> Controls:
    measured, scores = scored(folder, work, method, **more)
    return measure_controls(measured, scores, silent)


def scored(
    folder: Path, work: Path, method: str, mask: Mask = MASKS["sinks"], **more: Any
) -> tuple[CalibrationRun, Scores]:
    measured = run(folder, EXAMPLES, mask, work, placement=SINGLE, **more)
    return measured, calibrate(measured, scoring(method), silent).scores


@pytest.mark.parametrize("mask", ["plain", "sinks", "full decode"])
@pytest.mark.parametrize("method", ["nll-restore", "nll-remove", "path-integral"])
def test_within_the_window_every_score_is_exactly_0(
    method: str, mask: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """In float32, where a batch of two would round otherwise than a batch of one."""
    found = controlled(sources["qwen3"], tmp_path / "work", method, mask=MASKS[mask])
    assert (found.null_examples, found.null_largest, found.ok) == (len(EXAMPLES), 0.0, True)


def narrower(original: Any) -> Any:
    """As if the window were one token less."""

    def wrong(self: SharedForward, *arguments: Any) -> Any:
        mask = self._mask
        self._mask = replace(mask, window_tokens=mask.window_tokens - 1)
        try:
            return original(self, *arguments)
        finally:
            self._mask = mask

    return wrong


@pytest.mark.parametrize("fault", ["window", "common"])
def test_an_engine_that_is_wrong_by_one_row_is_found_out(
    fault: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the null control, or else by the answers of the whole model."""
    if fault == "window":
        monkeypatch.setattr(SharedForward, "_past", narrower(SharedForward._past))
    else:
        token_spans = forward.token_spans

        def one_more(*arguments: Any) -> TokenSpans:
            spans = token_spans(*arguments)
            return replace(spans, common=min(spans.common + 1, spans.answer))

        monkeypatch.setattr(forward, "token_spans", one_more)
    mask = MASKS["plain"]
    measured, scores = scored(sources["mistral"], tmp_path / "work", "nll-restore", mask)
    null_fails = not measure_controls(measured, scores, silent).ok
    plain, apart = Plain(sources["mistral"], mask), []
    for example, found in zip(EXAMPLES, scores.examples, strict=True):
        sliding = plain.nll(example, layer_types_of((), LAYERS))
        for layer, score in enumerate(found.scores):
            assert score is not None
            restored = sliding - plain.nll(example, layer_types_of((layer,), LAYERS))
            apart.append(abs(score - restored))
    assert null_fails or max(apart) > 1e-4


def test_a_score_within_the_window_fails_the_control(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine would give that hides what the window shows."""
    from converter.inference.runner import ModelRunner

    answers = ModelRunner.answers

    def wrong(
        self: ModelRunner, examples: Sequence[Any], plans: Sequence[LayerTypes], advance: Any
    ) -> Any:
        found = answers(self, examples, plans, advance)
        for row in found:
            # Not for the sliding plan alone, so that differences remain.
            row[-1] = type(row[-1])(row[-1].nll + 1e-6, row[-1].correct)
        return found

    monkeypatch.setattr(ModelRunner, "answers", wrong)
    found = controlled(sources["qwen3"], tmp_path / "work")
    assert found.null_largest and found.null_largest > 0 and not found.ok


def test_sensitivity_is_what_a_missing_attention_adds(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Against the whole model with the layer's output projection zeroed, in float64."""
    measured, scores = scored(sources["qwen2"], tmp_path / "work", "nll-remove")
    found = measure_controls(measured, scores, silent)
    plain = Plain(sources["qwen2"], MASKS["sinks"])
    expected = []
    for layer in range(LAYERS):
        kinds = tuple(NO_ATTENTION if i == layer else FULL for i in range(LAYERS))
        added = [plain.nll(e, kinds) - plain.nll(e, (FULL,) * LAYERS) for e in EXAMPLES]
        expected.append(sum(added) / len(added))
    assert found.sensitivity == pytest.approx(expected, abs=1e-5)
    means = [estimate.mean for estimate in scores.estimates]
    assert found.sensitivity_correlation == pytest.approx(spearman(expected, means))
    assert found.split_half == split_half(scores.examples)
    assert found.inclusion == inclusion(scores, 1)
    assert (found.near_examples, found.near_share) == (0, None)


def test_near_evidence_is_held_against_the_example_it_was_made_from(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    near = {1: EXAMPLES[1], 4: example_of(10, len(EXAMPLES[4].answer), 9)}
    same = controlled(sources["qwen3"], tmp_path / "same", near={1: near[1]})
    assert (same.near_examples, same.near_share) == (1, pytest.approx(1.0))
    # The other lies within the window, so nothing is left of its scores.
    gone = controlled(sources["qwen3"], tmp_path / "gone", near={4: near[4]})
    assert (gone.near_examples, gone.near_share) == (1, 0.0)
    both = controlled(sources["qwen3"], tmp_path / "both", near=near)
    assert 0 < (both.near_share or 0) < 1


def test_a_window_too_small_for_a_prompt_has_no_null(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    found = controlled(sources["qwen3"], tmp_path / "work", mask=Mask(2))
    assert (found.null_examples, found.null_largest, found.ok) == (0, None, True)


def test_a_killed_control_resumes(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.calibration.cache import ResultLog

    class Stop(Exception):  # noqa: N818 - stands for a kill
        pass

    measured, scores = scored(sources["qwen3"], tmp_path / "work", "nll-restore")
    append, count = ResultLog.append, itertools.count(1)

    def fails(self: ResultLog, record: Any) -> None:
        if next(count) > 4:
            raise Stop
        append(self, record)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ResultLog, "append", fails)
        measure_controls(measured, scores, silent)
    log = tmp_path / "work" / "controls.jsonl"
    lines = log.read_text().splitlines()
    found = measure_controls(measured, scores, silent)
    assert log.read_text().splitlines()[: len(lines)] == lines
    assert found == controlled(sources["qwen3"], tmp_path / "other")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A run on the bundled model, whose layers do look things up."""
    if not DEMO.exists():
        pytest.skip("the demo model is not in this checkout")
    out = tmp_path_factory.mktemp("demo") / "scores.json"
    command: list[object] = ["calibrate", DEMO, "--out", out, "--samples", 8, "--recipe", "demo"]
    return out, [*command, "--device", "cpu"]


def test_the_controls_of_the_demo_model(
    demo: tuple[Path, list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = demo
    assert run_cli(*command, "--controls") == 0
    printed, talk = capsys.readouterr()
    for words in (
        *("null: prompts within the window", "largest score 0 on 8 examples"),
        *("evidence inside the window", "rank correlation with generic sensitivity"),
        "rank correlation of split halves",
    ):
        assert words in printed, talk
    controls = json.loads(out.read_text())["controls"]
    assert controls["null_largest"] == 0
    assert controls["near_examples"] > 0
    # With its evidence beside the question, an answer needs no long range.
    assert controls["near_share"] < 0.5
    assert len(controls["sensitivity"]) == load_scores(out).units.total
    assert load_scores(out).controls == controls


def test_failing_controls_exit_with_1_and_keep_the_scores(
    demo: tuple[Path, list[object]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from converter import pipeline

    out, command = demo

    def failing(*arguments: Any) -> Controls:
        return replace(measure_controls(*arguments), null_largest=1e-4)

    monkeypatch.setattr(pipeline, "measure_controls", failing)
    assert run_cli(*command, "--controls", "--force", "--samples", 2) == 1
    assert "FAILED, it must be 0" in capsys.readouterr().out
    assert json.loads(out.read_text())["controls"]["null_largest"] == 1e-4
