"""Which sets of calibration data a run takes, and the rows of their files.

`--data` names one source, or several with a label each: `chat=chat.jsonl,code=code.jsonl,recall`.
Those of the Hub are files by now (see `hub`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converter.calibration.data.facts import KINDS
from converter.calibration.data.forms import read_exchange
from converter.calibration.data.hub import is_on_hub, local_path
from converter.common.errors import DataError

BUILT_IN = "recall"
_ONE = f"{BUILT_IN!r}, a .jsonl, .json, .parquet, .txt or .md file, or hub:OWNER/NAME"
_TEXTS = (".txt", ".md")
_SEVERAL = f"LABEL=FILE,LABEL=FILE,..., where {BUILT_IN!r} may stand for a file"


@dataclass(frozen=True)
class DataSet:
    """One source of examples: `recall`, a text, or a file of rows.

    A label is the kind of all its examples; without, they have the kinds that the source gives.
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
        return self.source == BUILT_IN or self._filler is not None

    def __str__(self) -> str:
        return self.source if self.label is None else f"{self.label}={self.source}"

    def text(self) -> str | None:
        """The text that generated examples are hidden in; None for one made on the spot."""
        return self._filler

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of a file, as they stand in it; DataError where it cannot be read."""
        return _READERS[self.path.suffix](self.path)

    @property
    def path(self) -> Path:
        """Its file; DataError where it is one of the Hub's that has not been downloaded."""
        return local_path(self.source) if is_on_hub(self.source) else Path(self.source)

    @cached_property
    def _filler(self) -> str | None:
        # Rows of mere text hold nothing to answer; facts are hidden in them as in a text file.
        if self.source == BUILT_IN:
            return None
        if self.path.suffix in _TEXTS:
            return read_text(self.path)
        mere = all(isinstance(r.get("text"), str) and _asks_nothing(r) for r in self.rows)
        return "\n\n".join(row["text"] for row in self.rows) if self.rows and mere else None


def data_sets(text: str) -> tuple[DataSet, ...]:
    """The sets that a `--data` names; a single bare source has no label.

    The whole text is one source where a file has that name, commas and equals signs or not.

    Raises:
        DataError: a set is not written as it must be, stands twice, or its file is not there.
    """
    if _is_source(text) or not {",", "="} & set(text):
        sets: tuple[DataSet, ...] = (DataSet(text),)
    else:
        sets = tuple(_data_set(part.strip()) for part in text.split(","))
    for each in sets:
        if not _is_source(each.source):
            raise DataError("there is no such data", where=each, expected=_ONE, got=each.source)
        if each.source != BUILT_IN and Path(each.source).suffix not in (*_TEXTS, *_READERS):
            raise DataError("data of this kind cannot be read", where=each, expected=_ONE)
    # The same file would be scored on and held out at once.
    files = [s.source if s.source == BUILT_IN else os.path.realpath(s.source) for s in sets]
    for what, values, next_step in (
        ("label", [s.name for s in sets], "give every set a label of its own: LABEL=FILE"),
        ("source", files, "name each source once"),
    ):
        if len(set(values)) < len(values):
            raise DataError(
                f"two data sets have the same {what}",
                where="--data",
                expected=f"every {what} once",
                got=", ".join(map(str, sets)),
                next_step=next_step,
            )
    return sets


def _is_source(text: str) -> bool:
    # Unlike Path.is_file, this also says no to what is too long to be a name.
    return text == BUILT_IN or is_on_hub(text) or os.path.isfile(text)  # noqa: PTH113


def _data_set(part: str) -> DataSet:
    if part == BUILT_IN:
        return DataSet(part)
    label, equals, source = (word.strip() for word in part.partition("="))
    if _is_source(part) or not equals:
        label, source = Path(part).stem, part
    if not source or not label:
        problem = f"a data set has no {'label' if source else 'source'}"
        raise DataError(problem, where="--data", expected=_SEVERAL, got=repr(part))
    if label in KINDS:
        raise DataError(
            "this label is the name of a kind of generated examples",
            where=f"--data {part}",
            expected=f"any label but {', '.join(KINDS)}",
            got=label,
            next_step=f"call it otherwise: my-{label}={source}",
        )
    return DataSet(source, label)


def _asks_nothing(row: Mapping[str, Any]) -> bool:
    return isinstance(read_exchange(row), str)


def read_text(path: Path) -> str:
    """A user's text.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        # Editors on Windows put a byte order mark first.
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError("a text cannot be read", where=path, got=error.strerror) from error
    except UnicodeDecodeError as error:
        raise DataError(
            "a text cannot be read", where=path, expected="UTF-8", got=f"not UTF-8 ({error})"
        ) from error


def read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    """The objects of a JSON Lines file, empty lines left out, or of a JSON array.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object; it names the line.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return _read_array(text, path)
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                "a line is not JSON",
                where=f"{path}:{number}",
                expected="an object on every line, or one array of objects",
                got=error,
            ) from error
        if not isinstance(row, dict):
            raise DataError("a line is not a JSON object", where=f"{path}:{number}")
        rows.append(row)
    return rows


def _read_array(text: str, path: Path) -> list[Mapping[str, Any]]:
    try:
        rows: list[Mapping[str, Any]] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("the file is not valid JSON", where=path, got=error) from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError("an element is not a JSON object", where=f"{path}, element {index}")
    return rows


def _read_parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            "reading parquet needs pyarrow",
            where=path,
            next_step='pip install "hybridize[parquet]"',
        ) from error
    try:
        return list(parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("a parquet file cannot be read", where=path, got=error) from error


_READERS: dict[str, Callable[[Path], list[Mapping[str, Any]]]] = {
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".parquet": _read_parquet,
}
KINDS_OF_FILES = (*_READERS, *_TEXTS)
