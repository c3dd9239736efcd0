"""Measuring against independent references: brute-force masks, torch's own losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from converter.cli.console import Console
from converter.common.errors import DataError
from converter.evaluation import metrics
from converter.evaluation.metrics import Answers, EvaluationRun, answer_items, compare
from converter.evaluation.models import HYBRID, ORIGINAL, Variant, VariantModels
from converter.evaluation.summary import NIL
from converter.evaluation.tasks.item import Item, score
from converter.inference.load import Placement
from converter.inference.tokenizer import load_tokenizer
from converter.model.mask import Mask
from converter.model.source import open_source
from tests.conftest import LAYERS
from tests.evaluation.conftest import MASK_OF, likeliest
from tests.hybrids import KEPT, MASKS, NEW, PLAN, WINDOW, load, random_ids, rule

FULL = Variant(ORIGINAL, tuple(range(LAYERS)), "all")
CHOSEN = Variant(HYBRID, KEPT, "layers")
TEXTS = [tuple(random_ids(60, seed)) for seed in range(3)]
MakeRun = Callable[..., EvaluationRun]


@pytest.fixture(scope="module")
def own_model(checkpoint: Callable[..., Path]) -> Callable[[str], Any]:
    """The Qwen3 model under a mask, to be switched between plans: not the one others share."""
    return cache(lambda mask: load(checkpoint("qwen3", mask)))


@pytest.fixture
def make_run(sources: dict[str, Path], own_model: Callable[[str], Any], tmp_path: Path) -> MakeRun:
    """What measures the Qwen3 model under a mask, in float64."""

    def made(mask: str = "plain", batch: int = 4, work: str = "work") -> EvaluationRun:
        models = VariantModels(own_model(mask), None, load_tokenizer(sources["qwen3"]))
        return EvaluationRun(
            source=open_source(str(sources["qwen3"])),
            mask=MASK_OF[mask],
            variants=(FULL, CHOSEN),
            models=lambda: models,
            placement=Placement("cpu", "float64"),
            batch=batch,
            work=tmp_path / work,
            fresh=False,
            progress=Console(json_output=False, verbosity=-1).progress,
        )

    return made


def item(seed: int, tokens: int, new_tokens: int = NEW) -> Item:
    prompt = tuple(random_ids(tokens, seed))
    return Item(
        task="made",
        prompt=prompt,
        references=("e", "zzz"),
        new_tokens=new_tokens,
        length_tokens=tokens,
        forced=(*prompt, *random_ids(5, seed + 500)),
        forced_from=tokens,
    )


@pytest.mark.parametrize("mask", MASKS)
def test_a_padded_batch_generates_what_the_brute_force_does_alone(
    mask: str, make_run: MakeRun, eager: Callable[[str], Any], sources: dict[str, Path]
) -> None:
    items = [item(seed, tokens) for seed, tokens in enumerate((60, 31, 97, 12))]
    texts = make_run(mask).models().generate(CHOSEN, items)
    tokenizer = load_tokenizer(sources["qwen3"])
    for one, text in zip(items, texts, strict=True):
        expected = eager("qwen3").greedy(list(one.prompt), NEW, PLAN, **rule(mask, len(one.prompt)))
        assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_answers_do_not_depend_on_the_batch(make_run: MakeRun) -> None:
    items = [item(seed, 20 + 9 * seed, new_tokens=3 + seed) for seed in range(7)]
    alone = answer_items(make_run(batch=1, work="one"), items)
    together = answer_items(make_run(batch=4, work="four"), items)
    for name, found in alone.items():
        other = together[name]
        assert (found.texts, found.scores) == (other.texts, other.scores)
        assert found.nll == pytest.approx(other.nll, abs=1e-5)
        assert found.kl == pytest.approx(other.kl, abs=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_losses_are_those_of_the_brute_force(
    mask: str, make_run: MakeRun, eager: Callable[[str], Any]
) -> None:
    items = [item(3, 80), item(4, 45)]
    found = answer_items(make_run(mask), items)
    for i, one in enumerate(items):
        ids = list(one.forced[:-1])
        rows = slice(one.forced_from - 1, None)
        full = eager("qwen3").logits(ids, ["full_attention"] * LAYERS, WINDOW)[rows]
        planned = eager("qwen3").logits(ids, PLAN, **rule(mask, one.forced_from))[rows]
        tokens = torch.tensor(one.forced[one.forced_from :])
        nll = torch.nn.functional.cross_entropy(planned, tokens)
        kl = torch.nn.functional.kl_div(
            planned.log_softmax(1), full.log_softmax(1), log_target=True, reduction="batchmean"
        )
        same = (planned.argmax(1) == full.argmax(1)).double().mean()
        assert found[HYBRID].nll[i] == pytest.approx(float(nll), abs=1e-5)
        assert found[HYBRID].kl[i] == pytest.approx(float(kl), abs=1e-5)
        assert found[HYBRID].agreement[i] == pytest.approx(float(same))
        assert found[ORIGINAL].kl[i] == 0.0
        assert found[HYBRID].scores[i] == score(found[HYBRID].texts[i], one.references, "all")


def test_comparing_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]).log()
    rows = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]]).log()
    found = compare([(rows[:2], reference[:2]), (rows[2:], reference[2:])], [0, 1, 1])
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    third = 0.1 * math.log(0.1 / 0.8) + 0.8 * math.log(8)
    assert found["kl"] == pytest.approx((first + third) / 3, rel=1e-5)
    assert found["nll"] == pytest.approx(-math.log(0.25 * 0.7 * 0.8) / 3, rel=1e-5)
    assert found["agreement"] == pytest.approx(1 / 3)
    assert (found["lost"], found["won"]) == (1, 1)
    assert {*found, "texts", "scores"} == set(Answers.__annotations__)
    with pytest.raises(DataError, match="not a finite number"):
        compare([(rows * float("nan"), reference)], [0, 1, 1])


def test_multiple_choice_is_the_likeliest(make_run: MakeRun, eager: Callable[[str], Any]) -> None:
    asked = item(9, 70)
    choices = tuple(((*asked.prompt, *random_ids(4, seed)), 70) for seed in range(20, 25))
    best = likeliest(eager("qwen3"), choices, PLAN)
    for right, (forced, _) in enumerate(choices):
        asked = replace(asked, match="choice", forced=forced, choices=choices, right_choice=right)
        found = answer_items(make_run(work=f"choice {right}"), [asked])
        assert found[HYBRID].scores == (float(right == best),)


@pytest.mark.parametrize("mask", MASKS)
def test_within_the_window_nothing_changes(mask: str, make_run: MakeRun) -> None:
    found = metrics.short_context(make_run(mask), TEXTS)
    assert found[HYBRID] == 0.0
    assert found["spread"] > 0


def test_a_mask_with_a_longer_window_than_the_model_is_seen(make_run: MakeRun) -> None:
    found = metrics.short_context(replace(make_run(), mask=Mask(WINDOW + 1)), TEXTS)
    assert found[HYBRID] > NIL * found["spread"]


def test_language_is_the_mean_over_a_chunk(make_run: MakeRun, eager: Callable[[str], Any]) -> None:
    chunks = [tuple(random_ids(100, seed)) for seed in (1, 2)]
    found = metrics.measure_text(make_run(), chunks)
    for i, chunk in enumerate(chunks):
        logits = eager("qwen3").logits(chunk[:-1], PLAN, **rule("plain", 999))
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(chunk[1:]))
        assert found[HYBRID].nll[i] == pytest.approx(float(expected), abs=1e-5)
    assert metrics.measure_text(make_run(), []) == {}


def test_a_long_text_is_compared_some_rows_at_a_time(
    make_run: MakeRun, own_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the logits of a whole text: of 16k tokens and a wide vocabulary they are 10 GB."""
    chunks = [tuple(random_ids(100, seed)) for seed in (1, 2)]
    whole = metrics.measure_text(make_run(work="whole"), chunks)
    short = metrics.short_context(make_run(), TEXTS)
    monkeypatch.setattr(metrics, "_ROWS", 16)
    rows: list[int] = []
    hook = own_model("plain").lm_head.register_forward_hook(
        lambda _head, _given, logits: rows.append(logits.shape[1])
    )
    in_rows = metrics.measure_text(make_run(work="rows"), chunks)
    short_in_rows = metrics.short_context(make_run(), TEXTS)
    hook.remove()
    assert max(rows) == 16
    for name, expected in whole.items():
        for column in expected.__annotations__:
            found = getattr(in_rows[name], column)
            assert found == pytest.approx(getattr(expected, column), rel=1e-6)
    assert short_in_rows == pytest.approx(short, rel=1e-9)


def test_chunks_are_spread_over_the_text(sources: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sources["qwen3"])
    path = tmp_path / "mine.txt"
    path.write_text("".join(chr(97 + i // 10) for i in range(100)))
    chunks = metrics.chunks_of(tokenizer, path, 10, 5)
    assert [tokenizer.decode(chunk) for chunk in chunks] == [c * 10 for c in "acegi"]
    assert len(metrics.chunks_of(tokenizer, path, 10, 99)) == 10
    path.write_text("short")
    with pytest.raises(DataError, match="too short"):
        metrics.chunks_of(tokenizer, path, 10, 5)


def test_finished_work_is_not_done_again(make_run: MakeRun) -> None:
    items = [item(seed, 30) for seed in range(5)]
    first = answer_items(make_run(batch=2), items)
    log = make_run().work / "tasks.jsonl"
    # What a kill in the middle of a line leaves: the last batch undone, the one before torn.
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    run = make_run(batch=2)
    progress = Mock(wraps=run.progress)
    assert answer_items(replace(run, progress=progress), items) == first
    assert len(log.read_bytes().splitlines()) == 4
    progress.assert_called_once_with("tasks", 1)


def test_speed_has_a_value_for_every_run(make_run: MakeRun) -> None:
    found = metrics.time_variants(make_run(), 40, 2)
    assert set(found) == {ORIGINAL, HYBRID}
    for speed in found.values():
        assert len(speed.prefill_seconds) == len(speed.decode_seconds) == 2
        assert min(*speed.prefill_seconds, *speed.decode_seconds) > 0
    assert metrics.time_variants(make_run(), 40, 0) == {}
