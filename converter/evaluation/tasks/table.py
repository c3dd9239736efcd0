"""The table of tasks, and the items that an evaluation asks."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.calibration.data.facts import KINDS
from converter.calibration.data.haystack import filler_pool
from converter.calibration.data.sources import read_text
from converter.common.errors import DataError, UsageError, did_you_mean
from converter.evaluation.tasks.aggregation import AGGREGATION_TASKS
from converter.evaluation.tasks.item import Item, Items, ItemSpec, Prompter, Task, generated_item
from converter.evaluation.tasks.lookup import LOOKUP_TASKS
from converter.evaluation.tasks.needles import NEEDLE_TASKS
from converter.evaluation.tasks.recall import RECALL, SUMMARY, recall_items
from converter.evaluation.tasks.rows import rows_items
from converter.model.dimensions import check_token

_RULER_TASKS = (*NEEDLE_TASKS, *AGGREGATION_TASKS)
RULER = tuple(task.name for task in _RULER_TASKS)
TASKS: dict[str, Task] = {task.name: task for task in (*_RULER_TASKS, *LOOKUP_TASKS)}
# Names that stand for several.
GROUPS: dict[str, tuple[str, ...]] = {"ruler": RULER, "all": (RECALL, *TASKS)}
SUMMARIES: dict[str, str] = {RECALL: SUMMARY} | {name: t.summary for name, t in TASKS.items()}

_LONGEST_DEFAULT_TOKENS = 16384


@dataclass(frozen=True)
class TaskSettings:
    """Which items to ask.

    Attributes:
        tasks: names out of `TASKS`, `recall`, or `GROUPS`.
        rows: files of the user's own.
        lengths_tokens: prompt and room for the answer together; None decides from the context.
        depths: how many depths, evenly spread from the start to the end.
        samples: items of each task and length; rows of each file.
        haystack: a text to hide things in; None for sentences made here.
    """

    tasks: tuple[str, ...]
    rows: tuple[Path, ...]
    lengths_tokens: tuple[int, ...] | None
    depths: int
    samples: int
    haystack: Path | None
    seed: int


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Task names with groups spelled out, each once.

    Raises:
        UsageError: there is no such task.
    """
    known = (RECALL, *TASKS, *GROUPS)
    for name in names:
        if name not in known:
            raise UsageError(
                "there is no such task",
                where="--tasks",
                expected=", ".join(known),
                got=name,
                next_step=did_you_mean(name, known),
            )
    return tuple(dict.fromkeys(part for name in names for part in GROUPS.get(name, (name,))))


def choose_lengths(settings: TaskSettings, context_tokens: int) -> tuple[int, ...]:
    """The lengths to ask for.

    Raises:
        UsageError: one is longer than the model's context.
    """
    if settings.lengths_tokens is None:
        longest = min(context_tokens, _LONGEST_DEFAULT_TOKENS)
        return tuple(int(longest * part) for part in (1 / 2, 3 / 4, 1))
    longest = max(settings.lengths_tokens)
    if longest > context_tokens:
        raise UsageError(
            "items would be longer than the model's context",
            where="--lengths",
            expected=f"at most {context_tokens} tokens, the answer included",
            got=longest,
        )
    return tuple(sorted(set(settings.lengths_tokens)))


def make_items(
    prompter: Prompter, settings: TaskSettings, context_tokens: int, vocabulary: int
) -> Items:
    """Make every item.

    Raises:
        UsageError: an unknown task, or a length past the model's context.
        DataError: a file or text that cannot be used, or nothing to ask.
    """
    names, lengths = expand(settings.tasks), choose_lengths(settings, context_tokens)
    text = None if settings.haystack is None else read_text(settings.haystack)
    # Sentences to hide things in; one made here is more than six tokens under any tokenizer.
    rng = random.Random(settings.seed)  # noqa: S311 (reproducible on purpose)
    haystack = filler_pool(rng, text, max(256, max(lengths) // 6))
    if len(haystack) < 2:
        raise DataError("the text has too few sentences", expected="at least 2", got=len(haystack))
    spread = [i / max(settings.depths - 1, 1) for i in range(settings.depths)]
    items: list[Item] = []
    for name in names:
        # Recall asks for its kinds in turn, and for each of them at every depth.
        turns = len(KINDS) if name == RECALL else 1
        specs = [
            ItemSpec(
                length,
                spread[i // turns % len(spread)],
                zlib.crc32(f"{settings.seed} {name} {length} {i}".encode()),
            )
            for length in lengths
            for i in range(settings.samples)
        ]
        if name == RECALL:
            items += recall_items(prompter, specs, text)
        else:
            units = 0
            for spec in specs:
                item, units = generated_item(TASKS[name], prompter, spec, haystack, units)
                items.append(item)
    dropped: dict[str, int] = {}
    for path in settings.rows:
        if path.stem in {item.task for item in items}:
            raise UsageError("two tasks have the same name", where="--rows", got=path.stem)
        rows = rows_items(path, prompter, context_tokens, settings.samples)
        items += rows.items
        dropped |= {f"{path.name}: {why}": count for why, count in rows.dropped.items()}
    check_token(max((item.largest_token for item in items), default=0), vocabulary)
    return Items(tuple(items), dropped)
