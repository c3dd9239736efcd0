"""Every selector on models trained here, at several budgets, on examples it has not seen.

    python benchmarks/compare_selectors.py
    python benchmarks/compare_selectors.py --models recurrent --budgets 1 2 3 4

For each model (`benchmarks/train_models.py` trains those that are missing) and each budget, every
selector chooses layers on the same calibration examples; the plans are then run on unseen test
examples, together with the periodic plans at every offset, the other baselines and, where the model
is small enough, every plan there is. Of a model with recurrent layers only those that attend fully
are chosen among. What is found is kept in `--work`, so a run that was stopped goes on; the record
is `benchmarks/selectors.md`, its numbers are in `benchmarks/selectors.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import selectors_record
import torch
import transformers
from rival_selectors import EVERY_SELECTOR
from train_models import MODELS, folder_of

from converter.calibration.calibrate import CalibrationTask, calibrate
from converter.calibration.comparison import (
    Candidate,
    evaluate_plans,
    periodic_candidates,
)
from converter.calibration.data.examples import Examples
from converter.calibration.data.facts import Counts
from converter.calibration.data.recall import base_prompt, recall_examples
from converter.calibration.distributed import ALONE
from converter.calibration.evaluator import open_evaluator
from converter.calibration.results import Outcome
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors import BEST, PERIODIC, Selector, selectors_of
from converter.cli.console import Console
from converter.inference.example import Example
from converter.inference.load import Placement
from converter.inference.positions import token_spans
from converter.inference.tokenizer import load_tokenizer
from converter.model.mask import Mask
from converter.model.source import open_source

HERE = Path(__file__).resolve().parent
WINDOW = 16
PROMPT_TOKENS = 256
BUDGETS = ("1/8", "1/4", "1/2")
# All plans of a budget are run where there are no more than so many.
MOST_PLANS = 260
# Models deeper than this have half as many examples of every part, as searching them is dear.
DEEP = 12
# And deeper ones than this have one draw of them.
DEEPEST_DRAWN_ANEW = 24
# Who is compared, periodic plans at every offset beside them, and who chooses once more where
# calibration examples are drawn anew.
COMPARED = tuple(name for name in EVERY_SELECTOR if name != PERIODIC.name)
OTHER_DRAWS = ("search", "guided")
CONSOLE = Console(json_output=False, verbosity=0)


def kept(budget: str, total: int) -> int:
    """How many of the layers that may slide keep full attention: a share of them, or a count."""
    return math.ceil(total * Fraction(budget)) if "/" in budget else int(budget)


def trained(name: str) -> Path:
    """A model's folder; trained now if it is not there."""
    folder = folder_of(name)
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, HERE / "train_models.py", name], check=True)
    return folder


def examples_of(folder: Path, counts: Counts, layers: int, samples: int, seed: int) -> Any:
    """Recall examples with the facts that the model was trained on."""
    tokenizer = load_tokenizer(folder)
    found = []
    for example in recall_examples(
        lambda text: len(tokenizer.encode(text)),
        samples=samples,
        length_tokens=PROMPT_TOKENS,
        reach_tokens=layers * WINDOW,
        seed=seed,
        counts=counts,
    ):
        prompt = tuple(tokenizer.encode(base_prompt(example)))
        answer = tuple(tokenizer.encode(" " + example.answer))
        found.append(Example(prompt, answer, example.kind))
    return tuple(found)


def calibration_run(name: str, options: argparse.Namespace, seed: int) -> CalibrationRun:
    """A model with its calibration, validation and test examples.

    The seed is of the first two; the test examples are always the same.
    """
    folder, counts = trained(name), MODELS[name].counts
    source = open_source(str(folder))
    layers = len(source.shape.full_layers)
    share = 2 if layers > DEEP else 1
    parts = (
        (options.samples // share, 1000 + seed),
        (options.validation // share, 2000 + seed),
        (options.test // share, 3000),
    )
    return CalibrationRun(
        source=source,
        examples=Examples(
            *(examples_of(folder, counts, layers, count, seed) for count, seed in parts)
        ),
        mask=Mask(WINDOW),
        placement=Placement("cpu", "float32"),
        memory_bytes=None,
        work=options.work / f"{name}-{seed}",
        fresh=False,
        processes=ALONE,
        say=CONSOLE.say,
        near_examples=dict,
    )


def choices_of(
    run: CalibrationRun, keep: int, selectors: Sequence[Selector]
) -> dict[str, tuple[tuple[int, ...], float | None]]:
    """What selectors, and the default, keep, and what each that measures costs by itself."""
    examples = run.examples.scored
    found: dict[str, tuple[tuple[int, ...], float | None]] = {}
    with open_evaluator(run, examples, "scores") as evaluator:
        for selector in selectors:
            expected = len(examples) * selector.cost(
                token_spans(examples[0], evaluator.mask, kinds=run.source.shape.kinds),
                evaluator.mask,
                evaluator.units,
                keep,
            )
            title = f"{run.source.name} {keep}: {selector.name}"
            with evaluator.tallying(title, expected, CONSOLE.progress) as tally:
                order = selector.choose(evaluator, keep).among(run.numbers).order
            cost = tally.layer_forwards if selector.measures else None
            found[selector.name] = tuple(sorted(order[:keep])), cost
    task = CalibrationTask(selectors_of(BEST), keep)
    scores = calibrate(run, task, CONSOLE.progress).scores
    found[BEST] = tuple(sorted(scores.order[:keep])), scores.layer_forwards
    return found


def candidates_of(
    run: CalibrationRun, keep: int, chosen: dict[str, tuple[tuple[int, ...], float | None]]
) -> dict[str, tuple[int, ...]]:
    """The plans to be run on the test examples, by name."""
    may_slide = run.source.shape.full_layers
    found = {name: layers for name, (layers, _) in chosen.items()}
    periodic = periodic_candidates(run, keep)
    found |= {f"{one.method}, offset {one.offset}": one.full for one in periodic}
    if math.comb(len(may_slide), keep) <= MOST_PLANS:
        found |= {f"plan {layers}": layers for layers in combinations(may_slide, keep)}
    return found


def run_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model, as the record wants it."""
    first, *other_seeds = options.seeds
    run = calibration_run(name, options, first)
    shape = run.source.shape
    total = len(shape.full_layers)
    uniform = {"original": shape.full_layers, "all sliding": ()}
    test = run.examples.held_out
    # Periodic plans take part at every offset.
    everybody = [EVERY_SELECTOR[name] for name in options.selectors]
    budgets = {}
    for budget in options.budgets:
        keep = kept(budget, total)
        chosen = choices_of(run, keep, everybody)
        plans = uniform | candidates_of(run, keep, chosen)
        found = evaluate_plans(
            run, test, "test", [Candidate(*plan) for plan in plans.items()], CONSOLE.progress
        )
        original = found[0]
        costs = {method: cost for method, (_, cost) in chosen.items()}
        budgets[budget] = {
            "keep": keep,
            "plans": [_row(outcome, original, costs) for outcome in found],
        }
    again = other_seeds if total <= DEEPEST_DRAWN_ANEW else []
    others = {str(seed): _choices_again(name, options, seed) for seed in again}
    naive = len(run.examples.scored) * shape.layers * (total + 1)
    return {
        "layers": total,
        "naive_layer_forwards": naive,
        "budgets": budgets,
        "other_seeds": others,
    }


def _choices_again(name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What selectors choose on other calibration examples, by budget, on the same test examples."""
    run = calibration_run(name, options, seed)
    may_slide = run.source.shape.full_layers
    others = [EVERY_SELECTOR[name] for name in OTHER_DRAWS]
    budgets = {}
    for budget in options.budgets:
        chosen = choices_of(run, kept(budget, len(may_slide)), others)
        plans = [
            Candidate("original", may_slide),
            *(Candidate(method, layers) for method, (layers, _) in chosen.items()),
        ]
        examples = run.examples.held_out
        original, *found = evaluate_plans(run, examples, "test", plans, CONSOLE.progress)
        budgets[budget] = [
            {
                "name": outcome.name,
                "layers": list(outcome.full),
                "nll_above": outcome.loss_above(original).mean,
                "right": sum(outcome.correct),
            }
            for outcome in found
        ]
    return budgets


def _row(outcome: Outcome, original: Outcome, costs: dict[str, float | None]) -> dict[str, Any]:
    above = outcome.loss_above(original)
    return {
        "name": outcome.name,
        "layers": list(outcome.full),
        "nll": outcome.loss.mean,
        "nll_above": above.mean,
        "nll_above_stderr": above.stderr,
        "right": sum(outcome.correct),
        "layer_forwards": costs.get(outcome.name),
        # For paired comparisons in the record; plans of no name need none.
        "per_example": None
        if outcome.name.startswith("plan ")
        else [round(nll, 4) for nll in outcome.nll],
        "correct": None if outcome.name.startswith("plan ") else list(map(int, outcome.correct)),
    }


def main() -> None:
    """Run what is missing and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--budgets", nargs="+", default=list(BUDGETS), help="shares of the layers, or counts"
    )
    parser.add_argument("--selectors", nargs="+", choices=EVERY_SELECTOR, default=list(COMPARED))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--validation", type=int, default=128)
    parser.add_argument("--test", type=int, default=192)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration; the first in full"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "selectors")
    parser.add_argument("--out", type=Path, default=HERE / "selectors.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "settings": {
            "samples": options.samples,
            "validation": options.validation,
            "test": options.test,
            "seeds": options.seeds,
            "budgets": options.budgets,
            "selectors": options.selectors,
            "window": WINDOW,
            "prompt_tokens": PROMPT_TOKENS,
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "models": {name: run_model(name, options) for name in options.models},
    }
    options.out.write_text(json.dumps(result) + "\n")
    selectors_record.write(options.out)


if __name__ == "__main__":
    main()
