"""An evaluation as one JSON object: what `--json`, the tables and the report are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from converter.common.statistics import accuracy, estimate, paired_difference, perplexity
from converter.evaluation.results import Evaluation
from converter.evaluation.tasks.table import SUMMARIES
from converter.evaluation.variants import HYBRID, Variant

FORMAT_VERSION = 1
# Within the window, logits may differ from full attention by this share of their spread at most.
NIL = 1e-3
# Below this, a task says nothing about what a plan lost: there was nothing to lose.
_USELESS = 0.1


def summarize(evaluation: Evaluation, *, whole: bool) -> dict[str, Any]:
    """Averages with their errors.

    Args:
        evaluation: what was measured.
        whole: also every single item with every variant's answer.
    """
    variants = {v.name: _variant(evaluation, v) for v in evaluation.variants}
    original = evaluation.variants[0].name
    model = HYBRID if HYBRID in variants else original
    mask = evaluation.mask
    value = {
        "format_version": FORMAT_VERSION,
        "model": evaluation.model,
        "mask": None if mask is None else mask.to_json(),
        **_essentials(variants[model]),
        "source": _essentials(variants[original]) if model != original else None,
        "variants": variants,
        "about": {task: SUMMARIES.get(task, "rows of a file") for task in evaluation.tasks},
        "short_context": _short_context(evaluation),
        "selectors": _selectors(evaluation),
        "dropped": dict(evaluation.dropped),
        "provenance": dict(evaluation.provenance),
    }
    value["findings"] = findings(value)
    if whole:
        value["items"] = _items(evaluation)
    return value


def _essentials(variant: Mapping[str, Any]) -> dict[str, Any]:
    text = variant["text"]
    answers = variant["answers"]
    kl = None
    if text is not None:
        kl = {**text["kl"], "tokens": "text"}
    elif answers is not None:
        kl = {**answers["kl"], "tokens": "answers"}
    return {
        "tasks": variant["tasks"],
        "perplexity": None if text is None else text["perplexity"],
        "kl": kl,
    }


def _variant(evaluation: Evaluation, variant: Variant) -> dict[str, Any]:
    name = variant.name
    speed = evaluation.speed.get(name)
    return {
        "full_attention_layers": list(variant.full_attention_layers),
        "method": variant.method,
        "tasks": {task: _task(evaluation, name, task) for task in evaluation.tasks},
        "overall": _task(evaluation, name, None) if evaluation.items else None,
        "heatmaps": {
            task: grid for task in evaluation.tasks if (grid := _heatmap(evaluation, name, task))
        },
        "answers": _answers(evaluation, name),
        "by_distance": _by_distance(evaluation, name),
        "text": _text(evaluation, name),
        "cost": evaluation.cost.get(name),
        "speed": None
        if speed is None
        else {
            "prompt_tokens": evaluation.speed_tokens,
            "runs": len(speed.prefill_seconds),
            "prefill_seconds": median(speed.prefill_seconds),
            "decode_seconds_per_token": median(speed.decode_seconds),
            "per_run": asdict(speed),
        },
        "harness": {task: found[name] for task, found in evaluation.harness.items()},
    }


def _task(evaluation: Evaluation, name: str, task: str | None) -> dict[str, Any]:
    """Accuracy with its interval, and the paired difference to the original."""
    indices = evaluation.of_task(task)
    scores = evaluation.scores(name, indices)
    original = evaluation.variants[0].name
    baseline = evaluation.scores(original, indices)
    return {
        **asdict(accuracy(scores)),
        # The original has no difference to itself, not one of nil with an interval.
        "difference": None if name == original else asdict(paired_difference(scores, baseline)),
        "by_length": _by_length(evaluation, name, indices),
    }


def _by_length(evaluation: Evaluation, name: str, indices: Sequence[int]) -> list[dict[str, Any]]:
    lengths = sorted({evaluation.items[i].length_tokens for i in indices})
    rows = []
    for length in lengths:
        mine = [i for i in indices if evaluation.items[i].length_tokens == length]
        rows.append({"length_tokens": length, **asdict(accuracy(evaluation.scores(name, mine)))})
    # Rows of a user's file are all of different lengths.
    return rows if len(rows) * 2 <= len(indices) else []


def _heatmap(evaluation: Evaluation, name: str, task: str) -> list[dict[str, Any]]:
    """Accuracy and count by length and depth; empty for tasks without depths."""
    cells: dict[tuple[int, float], list[int]] = {}
    for index in evaluation.of_task(task):
        item = evaluation.items[index]
        if item.depth is not None:
            cells.setdefault((item.length_tokens, item.depth), []).append(index)
    return [
        {
            "length_tokens": length,
            "depth": depth,
            "accuracy": math.fsum(evaluation.scores(name, indices)) / len(indices),
            "n": len(indices),
        }
        for (length, depth), indices in sorted(cells.items())
    ]


def _answers(evaluation: Evaluation, name: str) -> dict[str, Any] | None:
    """Loss, divergence, agreement and flips on the references' tokens."""
    if not evaluation.items:
        return None
    answers = evaluation.answers[name]
    baseline = evaluation.answers[evaluation.variants[0].name]
    tokens = sum(len(item.forced) - item.forced_from for item in evaluation.items)
    return {
        "nll": asdict(estimate(answers.nll)),
        "nll_above_original": asdict(_above(answers.nll, baseline.nll)),
        "kl": asdict(estimate(answers.kl)),
        "agreement": asdict(estimate(answers.agreement)),
        "flips": {"lost": sum(answers.lost), "won": sum(answers.won), "tokens": tokens},
    }


def _above(values: Sequence[float], baseline: Sequence[float]) -> Any:
    return estimate([a - b for a, b in zip(values, baseline, strict=True)])


def _by_distance(evaluation: Evaluation, name: str) -> list[dict[str, Any]]:
    """Loss on answers by the distance of their evidence, in doublings of the window."""
    distances = {
        i: item.distance_tokens
        for i, item in enumerate(evaluation.items)
        if item.distance_tokens is not None
    }
    if not distances or evaluation.mask is None:
        return []
    answers = evaluation.answers[name]
    baseline = evaluation.answers[evaluation.variants[0].name]
    farthest = max(distances.values())
    rows: list[dict[str, Any]] = []
    low, high = 0, min(evaluation.mask.window_tokens, farthest)
    while low < farthest:
        mine = [i for i, distance in distances.items() if low < distance <= high]
        if mine:
            nll = [answers.nll[i] for i in mine]
            rows.append(
                {
                    "above_tokens": low,
                    "up_to_tokens": high,
                    "n": len(mine),
                    "nll": asdict(estimate(nll)),
                    "nll_above_original": asdict(_above(nll, [baseline.nll[i] for i in mine])),
                    "accuracy": asdict(accuracy(evaluation.scores(name, mine))),
                }
            )
        low, high = high, min(high * 2, farthest)
    return rows


def _text(evaluation: Evaluation, name: str) -> dict[str, Any] | None:
    language = evaluation.language.get(name)
    if language is None:
        return None
    baseline = evaluation.language[evaluation.variants[0].name]
    return {
        "chunks": len(language.nll),
        "chunk_tokens": evaluation.text_tokens,
        "nll": asdict(estimate(language.nll)),
        "nll_above_original": asdict(_above(language.nll, baseline.nll)),
        "perplexity": asdict(perplexity(language.nll)),
        "kl": asdict(estimate(language.kl)),
        "agreement": asdict(estimate(language.agreement)),
    }


def _short_context(evaluation: Evaluation) -> dict[str, Any] | None:
    """Whether every plan computes within the window what full attention does."""
    if not evaluation.regression or evaluation.mask is None:
        return None
    worst = {k: v for k, v in evaluation.regression.items() if k != "spread"}
    limit = NIL * evaluation.regression["spread"]
    return {
        "window_tokens": evaluation.mask.window_tokens,
        "largest_logit_difference": worst,
        "limit": limit,
        "ok": all(value <= limit for value in worst.values()),
    }


def _selectors(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Ways of choosing the same number of layers, where there are several."""
    by_count: dict[int, dict[str, list[Variant]]] = {}
    for variant in evaluation.variants[1:]:
        methods = by_count.setdefault(len(variant.full_attention_layers), {})
        mine = methods.setdefault(variant.method, [])
        if variant.key not in {other.key for other in mine}:
            mine.append(variant)
    rows = []
    for count, methods in sorted(by_count.items()):
        if len(methods) < 2 or not evaluation.items:
            continue
        first = next(iter(methods.values()))[0]
        indices = evaluation.of_task(None)
        for method, variants in methods.items():
            for variant in variants:
                scores = evaluation.scores(variant.name, indices)
                reference = evaluation.scores(first.name, indices)
                rows.append(
                    {
                        "full_layers": count,
                        "method": method,
                        "variant": variant.name,
                        "full_attention_layers": list(variant.full_attention_layers),
                        **asdict(accuracy(scores)),
                        "kl": asdict(estimate(evaluation.answers[variant.name].kl)),
                        "against": first.name,
                        "difference": None
                        if variant == first
                        else asdict(paired_difference(scores, reference)),
                    }
                )
    return rows


def _items(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "task": item.task,
            "length_tokens": item.length_tokens,
            "prompt_tokens": len(item.prompt),
            "depth": item.depth,
            "distance_tokens": item.distance_tokens,
            "references": list(item.references),
            "answers": {
                name: {
                    "text": answers.texts[i],
                    "score": answers.scores[i],
                    "nll": answers.nll[i],
                    "kl": answers.kl[i],
                }
                for name, answers in evaluation.answers.items()
            },
        }
        for i, item in enumerate(evaluation.items)
    ]


def findings(value: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and what they do not, in sentences."""
    variants = value["variants"]
    original = next(iter(variants.values()))
    useless = [t for t, found in original["tasks"].items() if found["accuracy"] < _USELESS]
    said = [
        f"The original itself answers almost nothing of {task} "
        f"({_share(original['tasks'][task])}): this task cannot show what a plan lost."
        for task in useless
    ]
    if HYBRID in variants:
        found = variants[HYBRID]["tasks"]
        said += _lost({task: found[task] for task in found if task not in useless})
    short = value["short_context"]
    if short is not None:
        worst = max(short["largest_logit_difference"].values(), default=0.0)
        said.append(
            f"Within {short['window_tokens']} tokens every plan computes what the original does "
            f"(largest logit difference {worst:.1e})."
            if short["ok"]
            else f"Within {short['window_tokens']} tokens a plan differs from the original: "
            f"logits by up to {worst:.1e}, where {short['limit']:.1e} is rounding. "
            "It does not compute its mask."
        )
    return said


def _lost(tasks: Mapping[str, Any]) -> list[str]:
    said = []
    for task, found in tasks.items():
        change = found["difference"]
        text = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        if change["high"] < 0:
            said.append(f"The hybrid loses on {task}: {text} in accuracy.")
        elif change["low"] > 0:
            said.append(f"The hybrid does better on {task}: {text} in accuracy.")
    unclear = [
        task
        for task, found in tasks.items()
        if found["difference"]["low"] <= 0 <= found["difference"]["high"]
    ]
    if unclear:
        said.append(
            f"No clear change of accuracy on {', '.join(unclear)}: the 95% intervals of the "
            "paired differences hold zero."
        )
    return said


def _share(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
