"""Scores files, read and checked: they come from anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from converter.calibration.results import MethodComparison
from converter.calibration.scores import FORMAT_VERSION, NATS, Drawn, ExampleScores, Race, Scores
from converter.common.errors import PlanError, ScoresError
from converter.common.files import read_json_object
from converter.model.mask import Mask

# Files of earlier versions do not name the unit: it was this one but for these methods.
_FAR = "share of attention out of sight"
_EARLIER_UNITS = {"kl-all": "nats per token", "lazy": _FAR, "lazy-inverted": _FAR}


def load_scores(path: Path) -> Scores:
    """Read a scores file.

    Raises:
        ScoresError: the file is missing or is not a scores file of this version.
    """
    value = read_json_object(path, ScoresError, "hybridize calibrate SOURCE --out scores.json")
    method = value.get("method")
    if value.get("format_version") != FORMAT_VERSION or not _is_plain(method):
        raise ScoresError(
            "this is not a scores file of this version",
            where=path,
            expected=f"format_version {FORMAT_VERSION} and a method",
            got=f"format_version {value.get('format_version')}, method {method}",
        )
    try:
        examples = tuple(map(ExampleScores.from_json, value["per_example"]))
        _check_examples(examples)
        count, kv_heads = len(examples[0].scores), value.get("kv_heads", 1)
        if type(kv_heads) is not int or kv_heads < 1 or count % kv_heads:
            raise ValueError(f"{count} scores are not those of {kv_heads!r} KV heads a layer")
        model_units = _model_units(value.get("model_layers", []), count)
        numbers = model_units or tuple(range(count))
        race, comparison, heads = value["race"], value["contest"], value.get("heads")
        unit = value.get("unit", _EARLIER_UNITS.get(method, NATS))
        if not _is_plain(unit):
            raise ValueError(f"no unit: {unit!r}")
        if comparison is not None:
            comparison = MethodComparison.from_json(comparison, numbers, kv_heads)
        return Scores(
            method=method,
            mask=Mask.from_json(value["mask"], path),
            examples=examples,
            layer_forwards=float(value["layer_forwards"]),
            fingerprint=_fingerprint(value["fingerprint"]),
            order=_order(value["order"], numbers),
            unit=unit,
            race=None if race is None else Race.from_json(race, numbers),
            heads=None if heads is None else _heads(heads, count // kv_heads),
            comparison=comparison,
            profiles={str(k): _order(v, numbers) for k, v in value["profiles"].items()},
            controls=None if value.get("controls") is None else dict(value["controls"]),
            drawn={
                name: Drawn(int(value["drawn"][name]["asked"]), int(value["drawn"][name]["got"]))
                for name in ("scored", "validation")
                if name in value.get("drawn", {})
            },
            model_units=model_units,
            kv_heads=kv_heads,
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, PlanError) as error:
        raise ScoresError("the scores file is damaged", where=path, got=error) from error


def _is_plain(value: object) -> TypeGuard[str]:
    """Whether it is a name that may be shown as it is; methods of other versions have one too."""
    return isinstance(value, str) and re.fullmatch(r"[\w -]{1,80}", value) is not None


def _order(value: Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
    if sorted(value) != list(layers) or any(type(layer) is not int for layer in value):
        raise ValueError(f"not an order of {len(layers)} layers: {value}")
    return tuple(value)


def _model_units(value: object, count: int) -> tuple[int, ...]:
    """Which units were scored; raise ValueError unless as many as said, and in order."""
    if value == []:
        return ()
    if not isinstance(value, list) or any(type(layer) is not int for layer in value):
        raise ValueError(f"no indices of layers: {value!r}")
    if len(value) != count or sorted(set(value)) != value or value[0] < 0:
        raise ValueError(f"not the indices of {count} layers: {value}")
    return tuple(value)


def _fingerprint(value: Mapping[str, Any]) -> dict[str, Any]:
    methods = value.get("methods", [])
    if not isinstance(methods, list) or not all(isinstance(name, str) for name in methods):
        raise ValueError(f"the fingerprint's methods are no names: {methods!r}")
    return dict(value)


def _heads(value: object, total: int) -> tuple[tuple[float, ...], ...]:
    """A table of gates; raise ValueError unless it has a row a layer, all of one width."""
    if not isinstance(value, list) or len(value) != total:
        raise ValueError(f"not a row of heads for each of {total} layers")
    rows = tuple(map(tuple, value))
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError("not as many heads in each layer")
    if not all(type(gate) in (int, float) and math.isfinite(gate) for row in rows for gate in row):
        raise ValueError("a head's gate is not a finite number")
    return rows


def _check_examples(examples: Sequence[ExampleScores]) -> None:
    """Raise ValueError unless every layer has a score, and every number is one."""
    lengths = {len(example.scores) for example in examples}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{sorted(lengths)} layers per example")
    given = [x for e in examples for x in (e.full, e.sliding, *e.scores) if x is not None]
    if not all(type(x) in (int, float) and math.isfinite(x) for x in given):
        raise ValueError("a loss is not a finite number")
    counts = [count for e in examples for count in (e.prompt_tokens, e.answer_tokens)]
    if not all(type(count) is int for count in counts):
        raise ValueError("a number of tokens is not a whole number")
    if not all(isinstance(example.kind, str) for example in examples):
        raise ValueError("the kind of an example is not a text")
    for layer, column in enumerate(zip(*(example.scores for example in examples), strict=True)):
        if set(column) == {None}:
            raise ValueError(f"layer {layer} has no score")
