"""An evaluation as one JSON object: what `--json`, the tables and the report are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from statistics import median
from typing import Any

from converter.common.statistics import accuracy, estimate, paired_difference, perplexity
from converter.evaluation.metrics import Answers, Language, Speed
from converter.evaluation.models import HYBRID, ORIGINAL, Variant
from converter.evaluation.tasks.item import Item
from converter.evaluation.tasks.table import SUMMARIES
from converter.model.mask import Mask

FORMAT_VERSION = 1
# Within the window, logits may differ from full attention by this share of their spread at most.
NIL = 1e-3
# Below this, a task says nothing about what a plan lost: there was nothing to lose.
_USELESS = 0.1


@dataclass(frozen=True)
class Evaluation:
    """Everything measured, by variant name; empty where it was not asked for.

    Attributes:
        mask: what sliding layers see; None for a model that was not converted.
        variants: what was compared, the original first.
        text_tokens: tokens of one chunk of text; 0 without a text.
        regression: what `short_context` found.
        speed_tokens: prompt length that speed was measured at.
        harness: lm-eval's results by task and variant name.
        dropped: rows left out, by reason.
    """

    model: str
    mask: Mask | None
    variants: tuple[Variant, ...]
    items: tuple[Item, ...]
    answers: Mapping[str, Answers]
    text_tokens: int
    language: Mapping[str, Language]
    regression: Mapping[str, float]
    cost: Mapping[str, Any]
    speed: Mapping[str, Speed]
    speed_tokens: int
    harness: Mapping[str, Any]
    dropped: Mapping[str, int]
    provenance: Mapping[str, Any]

    @property
    def tasks(self) -> dict[str, list[int]]:
        """Indices of each task's items, in the order asked."""
        tasks: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            tasks.setdefault(item.task, []).append(i)
        return tasks

    def scores(self, variant: str, indices: Sequence[int]) -> list[float]:
        """Scores of some items."""
        scores = self.answers[variant].scores
        return [scores[i] for i in indices]


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """Averages with their errors, and under `items` every item with every variant's answer."""
    variants = {v.name: _variant(evaluation, v) for v in evaluation.variants}
    model = HYBRID if HYBRID in variants else ORIGINAL
    mask = evaluation.mask
    value = {
        "format_version": FORMAT_VERSION,
        "model": evaluation.model,
        "mask": None if mask is None else mask.to_json(),
        **_essentials(variants[model]),
        "source": _essentials(variants[ORIGINAL]) if model != ORIGINAL else None,
        "variants": variants,
        "about": {task: SUMMARIES.get(task, "rows of a file") for task in evaluation.tasks},
        "short_context": _short_context(evaluation),
        "selectors": _selectors(evaluation),
        "dropped": dict(evaluation.dropped),
        "provenance": dict(evaluation.provenance),
    }
    return {**value, "findings": findings(value), "items": _items(evaluation)}


def accuracy_text(value: Mapping[str, Any]) -> str:
    """An accuracy with its interval."""
    return f"{value['accuracy']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def difference_text(value: Mapping[str, Any] | None) -> str:
    """A paired difference with its interval; nothing for the original itself."""
    if value is None:
        return ""
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def _essentials(variant: Mapping[str, Any]) -> dict[str, Any]:
    text = variant["text"]
    on = "answers" if text is None else "text"
    return {
        "tasks": variant["tasks"],
        "perplexity": None if text is None else text["perplexity"],
        "kl": None if variant[on] is None else {**variant[on]["kl"], "tokens": on},
    }


def _number(layers: int | Fraction) -> int | float:
    return int(layers) if layers == int(layers) else float(layers)


def _variant(evaluation: Evaluation, variant: Variant) -> dict[str, Any]:
    name, tasks = variant.name, evaluation.tasks
    every = range(len(evaluation.items))
    return {
        "full_attention_layers": list(variant.full_attention_layers),
        "layer_types": list(variant.layer_types) or None,
        "full_layers": _number(variant.full_layers),
        "method": variant.method,
        "tasks": {task: _scored(evaluation, name, mine) for task, mine in tasks.items()},
        "overall": _scored(evaluation, name, every) if evaluation.items else None,
        "heatmaps": {
            task: grid for task, mine in tasks.items() if (grid := _heatmap(evaluation, name, mine))
        },
        "answers": _answers(evaluation, name),
        "by_distance": _by_distance(evaluation, name),
        "text": _text(evaluation, name),
        "cost": evaluation.cost[name],
        "speed": _speed(evaluation, name),
        "harness": {task: found[name] for task, found in evaluation.harness.items()},
    }


def _scored(evaluation: Evaluation, name: str, indices: Sequence[int]) -> dict[str, Any]:
    """Accuracy with its interval, also by length, and the paired difference to the original."""
    scores = evaluation.scores(name, indices)
    baseline = evaluation.scores(ORIGINAL, indices)
    # The original has no difference to itself, not one of nil with an interval.
    same = name == ORIGINAL
    by_length: dict[int, list[int]] = {}
    for i in indices:
        by_length.setdefault(evaluation.items[i].length_tokens, []).append(i)
    return {
        **asdict(accuracy(scores)),
        "difference": None if same else asdict(paired_difference(scores, baseline)),
        "by_length": [
            {"length_tokens": length, **asdict(accuracy(evaluation.scores(name, mine)))}
            for length, mine in sorted(by_length.items())
            # Rows of a user's file are all of different lengths.
            if len(by_length) * 2 <= len(indices)
        ],
    }


def _heatmap(evaluation: Evaluation, name: str, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Empty for tasks without depths."""
    cells: dict[tuple[int, float], list[int]] = {}
    for i in indices:
        item = evaluation.items[i]
        if item.depth is not None:
            cells.setdefault((item.length_tokens, item.depth), []).append(i)
    return [
        {
            "length_tokens": length,
            "depth": depth,
            "accuracy": math.fsum(evaluation.scores(name, mine)) / len(mine),
            "n": len(mine),
        }
        for (length, depth), mine in sorted(cells.items())
    ]


def _answers(evaluation: Evaluation, name: str) -> dict[str, Any] | None:
    if not evaluation.items:
        return None
    answers = evaluation.answers[name]
    tokens = sum(len(item.forced) - item.forced_from for item in evaluation.items)
    return {
        "nll": asdict(estimate(answers.nll)),
        "nll_above_original": _above(answers.nll, evaluation.answers[ORIGINAL].nll),
        "kl": asdict(estimate(answers.kl)),
        "agreement": asdict(estimate(answers.agreement)),
        "flips": {"lost": sum(answers.lost), "won": sum(answers.won), "tokens": tokens},
    }


def _text(evaluation: Evaluation, name: str) -> dict[str, Any] | None:
    if not evaluation.language:
        return None
    text = evaluation.language[name]
    return {
        "chunks": len(text.nll),
        "chunk_tokens": evaluation.text_tokens,
        "nll": asdict(estimate(text.nll)),
        "nll_above_original": _above(text.nll, evaluation.language[ORIGINAL].nll),
        "perplexity": asdict(perplexity(text.nll)),
        "kl": asdict(estimate(text.kl)),
        "agreement": asdict(estimate(text.agreement)),
    }


def _above(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    return asdict(estimate([a - b for a, b in zip(values, baseline, strict=True)]))


def _by_distance(evaluation: Evaluation, name: str) -> list[dict[str, Any]]:
    """Loss on answers by the distance of their evidence, in doublings of the window."""
    distances = {
        i: item.distance_tokens
        for i, item in enumerate(evaluation.items)
        if item.distance_tokens is not None
    }
    if not distances or evaluation.mask is None:
        return []
    losses = evaluation.answers[name].nll
    baseline = evaluation.answers[ORIGINAL].nll
    farthest = max(distances.values())
    rows: list[dict[str, Any]] = []
    low, high = 0, min(evaluation.mask.window_tokens, farthest)
    while low < farthest:
        mine = [i for i, distance in distances.items() if low < distance <= high]
        if mine:
            nll = [losses[i] for i in mine]
            rows.append(
                {
                    "above_tokens": low,
                    "up_to_tokens": high,
                    "n": len(mine),
                    "nll": asdict(estimate(nll)),
                    "nll_above_original": _above(nll, [baseline[i] for i in mine]),
                    "accuracy": asdict(accuracy(evaluation.scores(name, mine))),
                }
            )
        low, high = high, min(high * 2, farthest)
    return rows


def _speed(evaluation: Evaluation, name: str) -> dict[str, Any] | None:
    if not evaluation.speed:
        return None
    speed = evaluation.speed[name]
    return {
        "prompt_tokens": evaluation.speed_tokens,
        "runs": len(speed.prefill_seconds),
        "prefill_seconds": median(speed.prefill_seconds),
        "decode_seconds_per_token": median(speed.decode_seconds),
        "per_run": asdict(speed),
    }


def _short_context(evaluation: Evaluation) -> dict[str, Any] | None:
    """Whether every plan computes within the window what full attention does."""
    if not evaluation.regression or evaluation.mask is None:
        return None
    worst = dict(evaluation.regression)
    limit = NIL * worst.pop("spread")
    return {
        "window_tokens": evaluation.mask.window_tokens,
        "largest_logit_difference": worst,
        "limit": limit,
        "ok": all(value <= limit for value in worst.values()),
    }


def _selectors(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Ways of choosing the same number of layers, where there are several."""
    if not evaluation.items:
        return []
    # By number of layers and method, each plan once.
    by_count: dict[int | Fraction, dict[str, dict[str, Variant]]] = {}
    for variant in evaluation.variants[1:]:
        methods = by_count.setdefault(variant.full_layers, {})
        methods.setdefault(variant.method, {}).setdefault(variant.key, variant)
    rows = []
    for count, methods in sorted(by_count.items()):
        plans = [variant for variants in methods.values() for variant in variants.values()]
        reference = evaluation.answers[plans[0].name].scores
        for variant in plans if len(methods) > 1 else ():
            answers = evaluation.answers[variant.name]
            difference = paired_difference(answers.scores, reference)
            rows.append(
                {
                    "full_layers": _number(count),
                    "method": variant.method,
                    "variant": variant.name,
                    "full_attention_layers": list(variant.full_attention_layers),
                    **asdict(accuracy(answers.scores)),
                    "kl": asdict(estimate(answers.kl)),
                    "against": plans[0].name,
                    "difference": None if variant == plans[0] else asdict(difference),
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
                name: {"text": a.texts[i], "score": a.scores[i], "nll": a.nll[i], "kl": a.kl[i]}
                for name, a in evaluation.answers.items()
            },
        }
        for i, item in enumerate(evaluation.items)
    ]


def findings(value: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and what they do not, in sentences."""
    variants = value["variants"]
    original = variants[ORIGINAL]["tasks"]
    useless = [task for task, found in original.items() if found["accuracy"] < _USELESS]
    said = [
        f"The original itself answers almost nothing of {task} "
        f"({accuracy_text(original[task])}): this task cannot show what a plan lost."
        for task in useless
    ]
    unclear = []
    for task, found in variants[HYBRID]["tasks"].items() if HYBRID in variants else ():
        change = found["difference"]
        if task in useless:
            continue
        if change["high"] < 0:
            said.append(f"The hybrid loses on {task}: {difference_text(change)} in accuracy.")
        elif change["low"] > 0:
            said.append(f"The hybrid does better on {task}: {difference_text(change)} in accuracy.")
        else:
            unclear.append(task)
    if unclear:
        said.append(
            f"No clear change of accuracy on {', '.join(unclear)}: the 95% intervals of the "
            "paired differences hold zero."
        )
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
