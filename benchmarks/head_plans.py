"""Plans of KV heads against plans of layers of the same memory, on examples nobody chose on.

    python benchmarks/head_plans.py --models demo four-heads

For each model (`benchmarks/train_models.py` trains those that are missing) and each share of the KV
cache, selectors choose KV heads and whole layers on the same calibration examples; the plans are
run on unseen test examples, with the best of all plans of layers where every one can be run. Losses
are held against that of guided search of layers by paired differences. Of a model with recurrent
layers, shares and plans are of the layers that attend fully. The record is
`benchmarks/head-plans.md`.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path

import torch
import transformers
from compare_selectors import BUDGETS, CONSOLE, HERE, MOST_PLANS, calibration_run, kept
from rival_selectors import EVERY_SELECTOR

from converter.calibration.comparison import Candidate, evaluate_plans, periodic_candidates
from converter.calibration.evaluator import open_evaluator
from converter.calibration.results import Outcome
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors.base import Selector
from converter.inference.positions import token_spans
from converter.plan.units import KV_HEAD, LAYER, Units

METHODS = ("guided", "path-integral", "greedy", "nll-restore")
EVERY_LAYER_PLAN = "best of all plans of layers"


def chosen(run: CalibrationRun, selector: Selector, keep: int) -> tuple[Candidate, float]:
    """A selector's plan by KV heads, and its passes of the model over each calibration example."""
    units, count = run.units, keep
    if selector.granularity == LAYER:
        units, count = Units(units.layers), keep // units.per_layer
    examples = run.examples.scored
    spans = token_spans(examples[0], run.mask, kinds=run.source.shape.kinds)
    with open_evaluator(run, examples, "scores") as evaluator:
        expected = len(examples) * selector.cost(spans, run.mask, units, count)
        title = f"{run.source.name} {keep}: {selector.label}"
        with evaluator.tallying(title, expected, CONSOLE.progress) as tally:
            order = selector.choose(evaluator.telling(units), count).order[:count]
    full = run.units.of_layers(order) if units != run.units else order
    passes = tally.layer_forwards / len(examples) / run.source.shape.layers
    return Candidate(selector.label, tuple(run.numbers[unit] for unit in full)), passes


def rows_of(run: CalibrationRun, budget: str, methods: list[str]) -> list[str]:
    """Lines of the table for one share of the KV cache."""
    layers = kept(budget, run.units.layers)
    keep = layers * run.units.per_layer
    selectors = [
        replace(EVERY_SELECTOR[name], granularity=granularity)
        for granularity in (LAYER, KV_HEAD)
        for name in methods
    ]
    found = [chosen(run, selector, keep) for selector in selectors]
    plans = [Candidate("original", run.numbers), *(plan for plan, _ in found)]
    plans += periodic_candidates(run, keep)
    fixed = len(plans)
    if comb(run.units.layers, layers) <= MOST_PLANS:
        every = combinations(run.source.shape.full_layers, layers)
        plans += [Candidate(f"plan {one}", run.units.of_layers(one)) for one in every]
    outcomes = evaluate_plans(run, run.examples.held_out, "test", plans, CONSOLE.progress)
    original, rest = outcomes[0], outcomes[1:fixed]
    named = [(one.name, one, passes) for one, (_, passes) in zip(rest, found, strict=False)]
    periodic = min(rest[len(found) :], key=lambda one: one.loss.mean)
    named.append((f"best periodic plan ({periodic.name})", periodic, 0.0))
    if every_plan := outcomes[fixed:]:
        best = min(every_plan, key=lambda one: one.loss.mean)
        named.append((EVERY_LAYER_PLAN, best, float(len(every_plan))))
    beside = next(one for name, one, _ in named if name == "guided")
    return [
        f"| {budget} | {_row(*each, original, beside)} |"
        for each in sorted(named, key=lambda each: each[1].loss.mean)
    ]


def _row(name: str, plan: Outcome, passes: float, original: Outcome, beside: Outcome) -> str:
    against = "" if plan is beside else str(plan.loss_above(beside))
    cells = (name, plan.loss_above(original), against, plan.accuracy, f"{passes:.1f}", plan.told)
    return " | ".join(map(str, cells))


def model_section(name: str, options: argparse.Namespace) -> list[str]:
    """What a model's part of the record says."""
    run = replace(calibration_run(name, options, 0), granularity=KV_HEAD)
    lines = [
        f"## {name}: {run.units.layers} layers of {run.units.per_layer} KV heads",
        "",
        "| KV cache | chosen by | above the original | above guided search of layers "
        "| answers right | passes | full layers, layer:heads |",
        "|---|---|---|---|---|---|---|",
    ]
    for budget in options.budgets:
        lines += rows_of(run, budget, options.methods)
    return [*lines, ""]


def main() -> None:
    """Compare, model by model, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["demo", "four-heads"])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--validation", type=int, default=1)
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "heads")
    parser.add_argument("--record", type=Path, default=HERE / "head-plans.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        "# Plans of KV heads against plans of layers: record",
        "",
        f"`python benchmarks/head_plans.py --models {' '.join(options.models)}`: window 16, recall",
        f"prompts of 256 tokens, {options.samples} calibration and {options.test} test examples.",
        "Losses in nats per answer token, ± standard error of paired differences; 95% intervals of",
        "the share of answers right; passes of the model over each calibration example. The KV",
        "cache of all plans of a share is the same size. The best of all plans of layers is chosen",
        "on the test examples themselves: nobody could have known it.",
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}.",
        "",
    ]
    for name in options.models:
        lines += model_section(name, options)
        options.record.write_text("\n".join(lines))
    CONSOLE.print(f"record: {options.record}")


if __name__ == "__main__":
    main()
