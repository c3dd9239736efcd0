"""Which sets of calibration data a run takes, and how they share its examples.

`--data` names one source, or several with a label each: `chat=chat.jsonl,code=code.jsonl,recall`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.calibration.data.recall import KINDS
from converter.common.errors import DataError

BUILT_IN = "recall"
SUFFIXES = (".jsonl", ".parquet", ".txt")
_ONE = f"{BUILT_IN!r}, or a .jsonl, .parquet or .txt file"
_SEVERAL = f"LABEL=FILE,LABEL=FILE,..., where {BUILT_IN!r} may stand for a file"


@dataclass(frozen=True)
class DataSet:
    """One source of examples.

    Attributes:
        source: `recall`, or a .jsonl, .parquet or .txt file.
        label: the kind of all its examples; None leaves the kinds that the source gives them.
    """

    source: str
    label: str | None = None

    @property
    def name(self) -> str:
        """What to call it among other sets."""
        return self.label or self.source

    @property
    def generated(self) -> bool:
        """Whether its examples are made rather than read."""
        return self.source == BUILT_IN or Path(self.source).suffix == ".txt"

    def __str__(self) -> str:
        return self.source if self.label is None else f"{self.label}={self.source}"


def data_sets(text: str) -> tuple[DataSet, ...]:
    """The sets that a `--data` names; a single bare source has no label.

    The whole text is one source where a file has that name, so commas and equals signs in a single
    file's name do no harm.

    Raises:
        DataError: a set is not written as it must be, stands twice, or its file is not there.
    """
    if _is_source(text) or not {",", "="} & set(text):
        sets: tuple[DataSet, ...] = (DataSet(text),)
    else:
        parts = [part.strip() for part in text.split(",")]
        sets = tuple(map(_data_set, parts))
    for each in sets:
        _check_source(each)
    _check_different(sets)
    return sets


def shares(total: int, sets: int) -> list[int]:
    """`total` examples shared out evenly; the first sets take what is left over."""
    return [total // sets + (place < total % sets) for place in range(sets)]


def in_turn(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The order in which sets of these sizes take turns.

    Returns:
        A place within a set and that set's index, for each example: any beginning holds as many
        examples of one set as of another, give or take one, until a set has no more.
    """
    return sorted((place, index) for index, size in enumerate(sizes) for place in range(size))


def _is_source(text: str) -> bool:
    # Unlike Path.is_file, this also says no to what is too long to be a name.
    return text == BUILT_IN or os.path.isfile(text)  # noqa: PTH113


def _data_set(part: str) -> DataSet:
    """A set as written between commas."""
    if part == BUILT_IN:
        return DataSet(part)
    label, equals, source = (piece.strip() for piece in part.partition("="))
    if _is_source(part) or not equals:
        label, source = Path(part).stem, part
    if not source or not label:
        raise DataError(
            "a data set has no label" if source else "a data set has no source",
            where="--data",
            expected=_SEVERAL,
            got=repr(part),
        )
    if label in KINDS:
        raise DataError(
            "this label is the name of a kind of generated examples",
            where=f"--data {part}",
            expected=f"any label but {', '.join(KINDS)}",
            got=label,
            next_step=f"call it otherwise: my-{label}={source}",
        )
    return DataSet(source, label)


def _check_source(data: DataSet) -> None:
    if not _is_source(data.source):
        raise DataError("there is no such data", where=data, expected=_ONE, got=data.source)
    if data.source != BUILT_IN and Path(data.source).suffix not in SUFFIXES:
        raise DataError("data of this kind cannot be read", where=data, expected=_ONE)


def _check_different(sets: Sequence[DataSet]) -> None:
    """Raise DataError where two sets have the same label or the same source."""
    names = Counter(each.name for each in sets)
    # The same file would be scored on and held out at once.
    files = Counter(_identity(each) for each in sets)
    for each in sets:
        if names[each.name] > 1 or files[_identity(each)] > 1:
            what = "label" if names[each.name] > 1 else "source"
            raise DataError(
                f"two data sets have the same {what}",
                where="--data",
                expected=f"every {what} once",
                got=", ".join(map(str, sets)),
                next_step="give every set a label of its own: LABEL=FILE"
                if what == "label"
                else "name each source once",
            )


def _identity(data: DataSet) -> str:
    return data.source if data.source == BUILT_IN else os.path.realpath(data.source)
