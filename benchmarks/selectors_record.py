"""The record of the comparison of selectors, in Markdown, from the numbers measured.

    python benchmarks/selectors_record.py [benchmarks/selectors.json]

writes the record and its picture again without measuring.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

import selectors_docs
from evaluation_record import table
from selectors_findings import default, every_plan, guided_against_search
from selectors_ordering import ordering
from selectors_picture import write_picture
from selectors_results import Budget, EveryPlan, Results, Run, Score, load
from selectors_seeds import seeds
from selectors_text import code, layer_list, number, signed

from converter.calibration.selectors import BEST

HERE = Path(__file__).resolve().parent
_DOCS = HERE.parent / "docs"


def write(path: Path, picture: Path | None = None) -> None:
    """Write the record beside its numbers, and the picture.

    Args:
        path: the JSON file of `compare_selectors.py`.
        picture: where the picture goes; left out, where `picture_of` says.
    """
    results, picture = load(path), picture or picture_of(path)
    write_picture(results, picture)
    if picture == _DOCS / "selectors.png":
        selectors_docs.update(_DOCS / "choosing.md", results)
    link = os.path.relpath(picture, path.parent)
    path.with_suffix(".md").write_text(record(results, link))


def picture_of(path: Path) -> Path:
    """Where the picture of numbers goes: those kept in this folder have it in `docs/`."""
    folder = _DOCS if path.resolve().parent == HERE else path.parent
    return folder / f"{path.stem}.png"


def record(results: Results, picture: str) -> str:
    """The record.

    Args:
        results: what was measured.
        picture: where the picture is, seen from the record.
    """
    parts = [
        *_head(results),
        *_summary(results, picture),
        *default(results),
        *guided_against_search(results),
        *ordering(results),
        *every_plan(results),
        *seeds(results),
        *_details(results),
    ]
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> list[str]:
    settings = results.settings
    command = "python benchmarks/compare_selectors.py --models " + " ".join(
        [model.name for model in results.models]
        + [f"--{name} {settings[name]}" for name in ("samples", "validation", "test")]
        + ["--seeds", *map(str, settings["seeds"])]
        + [
            f"--{name} {shlex.join(settings[name])}"
            for name in ("budgets", "selectors")
            if name in settings
        ]
    )
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    rows = []
    for model in results.models:
        budget = next(iter(model.budgets.values()))
        kept = ", ".join(f"{b.keep} at {b.name}" for b in model.budgets.values())
        sliding = budget.run("all sliding")
        cells = (budget.original.right, sliding.right, sliding.above)
        rows.append((model.name, model.layers, kept, *cells))
    return [
        "# Ways to choose the layers, compared: record",
        f"Written by `{command}` ({versions}).",
        f"Every selector chooses on the same {settings['samples']} calibration examples; `{BEST}`, "
        f"the default, tries what its selectors choose on up to {settings['validation']} "
        f"validation examples too; deep models have half as many of both, and of test examples. "
        f"All numbers are of {settings['test']} test examples that no choice has "
        f"seen: questions about facts far back in a prompt of {settings['prompt_tokens']} tokens. "
        f"Sliding layers see {settings['window']} tokens. Calibration and validation examples are "
        f"drawn by seed {settings['seeds'][0]}, the test examples are always the same; other draws "
        "have a section of their own.",
        "The models were trained from nothing by [train_models.py](train_models.py) ([one of "
        "them](demo-model.md)), on the same kind of questions with different facts, or grown from "
        "the first and trained on (some with layers left out at random, one with recurrent layers "
        "in the place of attention: of its layers only those that attend fully are counted). "
        "They are small; what holds for them need not hold for large ones.",
        table(
            (
                "model",
                "layers",
                "that keep full attention",
                "original: answers right",
                "all sliding: answers right",
                "all sliding: NLL above the original",
            ),
            rows,
        ),
        "How to read the numbers:",
        "- **NLL** is the mean negative log-likelihood of the answer, nats per token; *above the "
        "original* is the paired difference on the same examples, ± its standard error.\n"
        "- **Answers right** are whole answers by greedy decoding, with Wilson's 95% interval. "
        "*Lost* is the original's share less the plan's, in points of 100.\n"
        "- **Intervals of differences** are 95% and paired: normal for NLL; for accuracy from the "
        "shares of questions gained and lost (Newcombe 1998).\n"
        "- **Cost** is what the choice took in layer-forwards (a row on the way back counts "
        "as two), 1.00 being naive restore-one: a pass of the model for each layer that may "
        f"slide, and one more, for each calibration example. `{BEST}` pays for all it tries, and "
        "for its validation.\n"
        "- **periodic, best offset** and *worst offset* are told by the test examples themselves: "
        "nobody could have chosen them so. *Mean of offsets* is what to expect of one drawn "
        "blindly.",
    ]


def _summary(results: Results, picture: str) -> list[str]:
    names = list(results.models[0].budgets)
    scores = [(model, budget.name, budget.scores()) for model, budget in results.budgets]
    rows = []
    for way in results.ways():
        cells = [(model, name, found[way]) for model, name, found in scores]
        row = [code(way), number(fmean(score.above for *_, score in cells))]
        for budget in names:
            here = {model.name: score for model, name, score in cells if name == budget}
            row += [_with_worst(here), f"{100 * fmean(s.lost for s in here.values()):.1f}"]
        rows.append((*row, _mean_cost([score for *_, score in cells])))
    above = "NLL above" if len(results.models) == 1 else "NLL above (worst)"
    columns = [f"{name}: {column}" for name in names for column in (above, "lost")]
    return [
        "## Summary",
        f"![How much of the gap each way of choosing closes]({picture})",
        "In the picture the default is blue; the band reaches from the worst periodic offset to "
        "the best (means over models).",
        "NLL above the original, mean over models, with the worst model; points of accuracy lost, "
        "mean over models. Sorted by the mean over everything, then by cost.",
        table(("chosen by", "NLL above, all", *columns, "cost"), rows),
    ]


def _with_worst(scores: Mapping[str, Score]) -> str:
    mean = number(fmean(score.above for score in scores.values()))
    if len(scores) == 1:
        return mean
    worst = max(scores, key=lambda name: scores[name].above)
    return f"{mean} ({worst} {number(scores[worst].above)})"


def _mean_cost(scores: Sequence[Score]) -> str:
    costs = [score.cost for score in scores if score.cost is not None]
    return f"{fmean(costs):.2f}" if costs else "none"


def _details(results: Results) -> list[str]:
    parts = [
        "## Every model and budget",
        "Names that share a row chose the same layers; in parentheses what the choice cost. The "
        "difference is that of the NLL to the best periodic offset's, negative where the plan is "
        "better.",
    ]
    for model, budget in results.budgets:
        title = f"### {model.name}, {budget.name}: {budget.keep} of {model.layers} layers"
        parts += [title, _detail(budget)]
    return parts


def _detail(budget: Budget) -> str:
    columns = [
        "chosen by (cost)",
        "full layers",
        "answers right",
        "NLL above the original",
        "to the best periodic",
    ]
    if budget.every is not None:
        columns += ["to the best plan", "rank"]
    together = sorted(budget.runs, key=lambda run: (run.loss, run.layers))
    groups = [list(runs) for _, runs in groupby(together, key=lambda run: run.layers)]
    return table(columns, [_detail_row(budget, runs) for runs in groups])


def _detail_row(budget: Budget, runs: Sequence[Run]) -> list[object]:
    run, against = runs[0], budget.best_periodic
    names = ", ".join(_named(budget, one) for one in runs)
    row: list[object] = [names, layer_list(run.layers), run.right, run.above]
    row.append("itself" if run.layers == against.layers else signed(run.loss_above(against)))
    if budget.every is not None:
        row += _place(budget.every, run.layers)
    return row


def _place(every: EveryPlan, layers: tuple[int, ...]) -> tuple[str, str]:
    if layers not in every.losses:  # the original and all sliding are of another budget
        return "", ""
    return number(every.distance(layers)), f"{every.rank(layers)} of {len(every.losses)}"


def _named(budget: Budget, run: Run) -> str:
    # Names are listed with commas: none within.
    name, cost = code(run.name.replace(", ", " ")), budget.cost(run)
    return name if cost is None else f"{name} ({cost:.2f})"


def main() -> None:
    """Write the record of numbers measured before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "selectors.json")
    parser.add_argument("--picture", type=Path, default=None)
    options = parser.parse_args()
    write(options.results, options.picture)


if __name__ == "__main__":
    main()
