"""lm-evaluation-harness on our loaded model, through its public `HFLM` class."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from converter.common.errors import DataError, UsageError
from converter.common.statistics import paired_difference
from converter.evaluation.metrics import EvaluationRun


@dataclass(frozen=True)
class HarnessSettings:
    """lm-eval's tasks, a folder of further task files or None, examples of each or None for all."""

    tasks: tuple[str, ...]
    include: Path | None
    limit: int | None


def check_installed() -> None:
    """Refuse early when lm-eval is not there.

    Raises:
        UsageError: saying how to get it.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UsageError(
            "running lm-eval's tasks needs lm-eval",
            where="--harness",
            next_step='pip install "hybridize[lm-eval]"',
        )


def run_harness(run: EvaluationRun, settings: HarnessSettings) -> dict[str, dict[str, Any]]:
    """lm-eval's results of every variant, by task and variant name.

    Each holds the metrics with lm-eval's standard errors; where every example has a metric
    between 0 and 1, also the paired difference to the original.

    Raises:
        UsageError: lm-eval knows no such task.
        DataError: a task's data cannot be loaded.
    """
    if not settings.tasks:
        return {}
    # Reading lm-eval's thousands of task files takes seconds.
    manager = cache(lambda: _task_manager(settings))

    def measure(variant_key: str) -> dict[str, Any]:
        models = run.models()
        model = models.running(run.different[variant_key])
        return _evaluate(model, models.tokenizer, settings, manager(), run.batch)

    what = [list(settings.tasks), str(settings.include), settings.limit, "lm-eval"]
    keys = list(run.different)
    by_key = dict(zip(keys, run.resumable("harness", what, keys, measure), strict=True))
    results: dict[str, dict[str, Any]] = {}
    for task, original in by_key[run.original.key].items():
        for variant in run.variants:
            found = dict(by_key[variant.key][task])
            columns = found.pop("per_example")
            expected = {} if variant == run.original else original["per_example"]
            found["differences"] = {
                metric: asdict(paired_difference(column, expected[metric]))
                for metric, column in columns.items()
                if metric in expected
            }
            results.setdefault(task, {})[variant.name] = found
    return results


def _task_manager(settings: HarnessSettings) -> Any:
    """What finds lm-eval's tasks, once the ones asked for are known to exist."""
    # lm-eval says every step of the way.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.include and str(settings.include))
    unknown = [name for name in settings.tasks if name not in manager.all_tasks]
    if unknown:
        raise UsageError(
            "lm-eval has no such task",
            where="--harness",
            got=", ".join(unknown),
            next_step="list them with: lm-eval ls tasks, or name a folder with --harness-tasks",
        )
    return manager


def _evaluate(
    model: Any, tokenizer: Any, settings: HarnessSettings, manager: Any, batch: int
) -> dict[str, Any]:
    """Metrics of one variant by task, and each example's."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    try:
        found = simple_evaluate(
            model=language_model,
            tasks=list(settings.tasks),
            task_manager=manager,
            limit=settings.limit,
            log_samples=True,
            verbosity="ERROR",
        )
    except (OSError, ValueError) as error:
        raise DataError(
            "lm-eval cannot run these tasks",
            where=", ".join(settings.tasks),
            got=(str(error).splitlines() or [type(error).__name__])[0],
            next_step="their data must be on this machine, or the network reachable",
        ) from error
    return {
        task: _metrics(values, found["samples"].get(task))
        for task, values in found["results"].items()
    }


def _metrics(
    values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Metrics with standard errors, by name, and each example's where all are between 0 and 1."""
    ordered = sorted(samples or (), key=lambda sample: int(sample["doc_id"]))
    metrics, per_example = {}, {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma:
            continue
        if not metric.endswith("_stderr") and _is_number(value):
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics[name] = {"value": value, "stderr": error if _is_number(error) else None}
        column: list[Any] = [sample.get(metric) for sample in ordered]
        if filtered == "none" and column and all(_is_number(x) and 0 <= x <= 1 for x in column):
            per_example[metric] = [float(x) for x in column]
    count = None if samples is None else len(samples)
    return {"n": count, "metrics": metrics, "per_example": per_example}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
