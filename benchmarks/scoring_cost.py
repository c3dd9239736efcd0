"""What scoring layers costs and finds, against one whole forward pass for each layer.

Two tables, everything of a row run in turn in this process, medians compared.

1. Exact scores (restore-one) by prefix reuse and row pruning against the naive method, on random
   models of four families with 8 and 12 layers and one of 24, and of one whose layers are recurrent
   but for each fourth, for windows of a 16th, a quarter and half of the prompt: ratio of times, and
   the largest difference of any score in float32. Beside it what first order takes.
2. Cheaper methods on trained models (the bundled one, and those given with --models): time against
   naive, how many of the chosen layers are those that exact scoring chooses, and rank correlation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from naive_scoring import restore_one
from rival_selectors import FIRST_ORDER
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from converter.calibration.calibrate import Calibration, CalibrationTask, calibrate
from converter.calibration.run import CalibrationRun, RunContext
from converter.calibration.scores import Scores
from converter.calibration.selectors import SELECTORS
from converter.calibration.selectors.one_layer import NLL_RESTORE
from converter.cli.console import Console
from converter.common.statistics import spearman
from converter.inference.example import Example
from converter.inference.load import Placement, load_model, load_runner
from converter.inference.memory import RESIDENT
from converter.model.mask import Mask
from converter.model.source import Source, open_source
from converter.pipeline import calibration_run
from converter.plan.units import Units
from converter.settings import Settings

FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "qwen3_5_text")
# The deepest on these only.
DEPTHS = (8, 12, 24)
DEEPEST = ("qwen3", "qwen3_5_text")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
# Sizes of recurrent layers, that are to the others' as in Qwen3.5-9B.
RECURRENT = {
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 32,
}
PROMPT, ANSWER = 1024, 16
QUIET = Console(json_output=False, verbosity=-1)
CPU = Placement("cpu", "float32")
DEMO = Path(__file__).parent / "demo-model"


def medians(ways: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each way, the ways in turn; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if run:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_source(folder: Path, family: str, layers: int) -> Source:
    """A random model whose attention matters."""
    torch.manual_seed(0)
    own = RECURRENT if family == "qwen3_5_text" else {}
    config = AutoConfig.for_model(family, num_hidden_layers=layers, **SIZES, **own)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.08)
            elif own and name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(1.0)  # which is added to one: at one attention is too flat
    model.save_pretrained(folder)
    return open_source(str(folder))


def exact_table(root: Path, families: Sequence[str], runs: int) -> None:
    """Prefix reuse and row pruning against naive scoring."""
    draw = random.Random(0)  # noqa: S311 - reproducible, not a secret
    example = Example(
        tuple(draw.randrange(512) for _ in range(PROMPT)),
        tuple(draw.randrange(512) for _ in range(ANSWER)),
        "random",
    )
    selector, first_order = NLL_RESTORE, FIRST_ORDER
    print(f"exact restore-one scores, prompts of {PROMPT} tokens, answers of {ANSWER}, float32")
    for layers in DEPTHS:
        for family in families:
            if layers == max(DEPTHS) and family not in DEEPEST:
                continue
            source = random_source(root / f"{family}-{layers}", family, layers)
            may_slide = source.shape.full_layers
            for window in (PROMPT // 16, PROMPT // 4, PROMPT // 2):
                mask = Mask(window)
                model = load_model(source, mask, CPU)
                runner = load_runner(source, mask, CPU, RESIDENT, root)
                found: dict[str, Sequence[float]] = {}

                units = Units(len(may_slide))
                asked = (runner, [example], range(units.total), lambda _: None, units)

                def naive(
                    model: PreTrainedModel = model,
                    found: dict[str, Sequence[float]] = found,
                    may_slide: Sequence[int] = may_slide,
                ) -> None:
                    found["naive"] = restore_one(model, example, may_slide)

                def walk(asked: Any = asked, found: dict[str, Sequence[float]] = found) -> None:
                    (scores,) = selector.measure(*asked)
                    found["walk"] = [score for score in scores.scores if score is not None]

                ways: dict[str, Callable[[], object]] = {
                    "naive": naive,
                    "walk": walk,
                    "first order": partial(first_order.measure, *asked),
                }
                seconds = medians(ways, runs)
                error = max(abs(a - b) for a, b in zip(found["naive"], found["walk"], strict=True))
                print(
                    f"  {family:12} {len(may_slide):2} of {layers:2} layers, window {window:3}: "
                    f"{seconds['walk'] / seconds['naive']:.2f} of naive time "
                    f"({seconds['walk']:.2f} s against {seconds['naive']:.2f} s), first order "
                    f"{seconds['first order'] / seconds['naive']:.2f}; "
                    f"largest difference {error:.1e} of scores up to "
                    f"{max(map(abs, found['naive'])):.2f}"
                )


@dataclass(frozen=True)
class Case:
    """A trained model and the settings to score it under."""

    name: str
    folder: Path
    settings: Settings


def cases(models: Path | None, texts: Path | None, root: Path) -> list[Case]:
    """The bundled model, and story models cut off in the middle of a story."""
    found = [
        Case(
            "bundled",
            DEMO,
            Settings(window=16, length=256, samples=64, budget="1/4"),
        )
    ]
    if models is None or texts is None:
        return found
    rows = root / "stories.jsonl"
    stories = texts.read_text(encoding="utf-8").replace("\r\n", "\n").split("<|endoftext|>")
    stories = [story.strip() for story in stories if len(story) > 900]
    random.Random(0).shuffle(stories)  # noqa: S311 - reproducible, not a secret
    with rows.open("w", encoding="utf-8") as file:
        for story in stories:
            cut = story.find(" ", 600)
            row = {"prompt": story[:cut], "answer": story[cut + 1 : cut + 200]}
            file.write(json.dumps(row) + "\n")
    settings = Settings(
        window=16, length=400, samples=32, budget="1/4", data=str(rows), min_answer=20
    )
    found += [Case(folder.name, folder, settings) for folder in sorted(models.iterdir())]
    return found


def _restore_one_by_one(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    for example in examples:
        restore_one(model, example, range(model.config.num_hidden_layers))


def cheap_table(root: Path, trained: list[Case], runs: int) -> None:
    """Racing and first order against exact scoring, on trained models."""
    work = RunContext(root / "work", True, QUIET.progress, lambda _: None, lambda _: None)
    for case in trained:
        source = open_source(str(case.folder))
        layers = source.shape.layers
        settings = replace(case.settings, holdout=0, device="cpu", dtype="float32")
        measurement = calibration_run(source, settings, work, comparing=False)
        examples = measurement.examples.scored
        model = load_model(source, measurement.mask, CPU)
        measurement.runner(False)
        keep = max(1, -(-layers // 4))
        tasks = {
            "exact": CalibrationTask((NLL_RESTORE,), keep),
            "racing": CalibrationTask((NLL_RESTORE,), keep, race=True),
            "first order": CalibrationTask((FIRST_ORDER,), keep),
        }
        results: dict[str, Scores] = {}
        ways: dict[str, Callable[[], object]] = {
            "naive": partial(_restore_one_by_one, model, examples)
        }
        for name, task in tasks.items():

            def score(
                name: str = name,
                task: CalibrationTask = task,
                measurement: CalibrationRun = measurement,
                results: dict[str, Scores] = results,
            ) -> Calibration:
                found = calibrate(measurement, task, QUIET.progress)
                results[name] = found.scores
                return found

            ways[name] = score
        seconds = medians(ways, runs)
        started = time.perf_counter()
        integral = CalibrationTask((SELECTORS["path-integral"],), keep)
        results["path integral"] = calibrate(measurement, integral, QUIET.progress).scores
        # Far dearer than the others, so it runs once.
        seconds["path integral"] = time.perf_counter() - started
        tokens = statistics.median(len(e.prompt) + len(e.answer) for e in examples)
        print(
            f"{case.name}: {layers} layers, {len(examples)} examples of {tokens:.0f} tokens "
            f"(median), window {measurement.mask.window_tokens}, {keep} chosen; "
            f"naive {seconds['naive']:.2f} s"
        )
        exact = results["exact"]
        for name, scores in results.items():
            overlap = len({*scores.order[:keep]} & {*exact.order[:keep]})
            correlation = spearman(*([one.mean for one in s.estimates] for s in (scores, exact)))
            race = ""
            if scores.race is not None:
                left = scores.race.open_layers(range(layers))
                race = f", {len(left)} layers left open"
            print(
                f"  {name:14} {seconds[name] / seconds['naive']:.2f} of naive time, "
                f"{overlap} of {keep} chosen layers the same, rank correlation {correlation:.2f}"
                f"{race}"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", type=Path, help="a folder of trained model folders")
    parser.add_argument("--text", type=Path, help="stories for them, parted by <|endoftext|>")
    parser.add_argument("--only", choices=("exact", "cheap"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    options = parser.parse_args()
    print(
        f"torch {version('torch')}, transformers {version('transformers')}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, medians of {options.runs} alternating runs"
    )
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if options.only != "cheap":
            exact_table(root, options.families, options.runs)
        if options.only != "exact":
            cheap_table(root, cases(options.models, options.text, root), options.runs)


if __name__ == "__main__":
    main()
