"""Settings: one table, three places to give them, every mistake told at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import UsageError
from converter.settings import SETTINGS, Settings, build_settings, read_recipe


def problems(
    recipe: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
) -> str:
    with pytest.raises(UsageError) as caught:
        build_settings(recipe or {}, overrides, options or {}, "mine.toml")
    return str(caught.value)


def test_the_table_and_the_dataclass_have_the_same_settings() -> None:
    assert [field.name for field in fields(Settings)] == list(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_table_and_the_dataclass_have_the_same_types(name: str) -> None:
    hint = get_type_hints(Settings)[name]
    kind = tuple[int, ...] if SETTINGS[name].kind is list else SETTINGS[name].kind
    assert hint == kind or kind in get_args(hint)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_documented(name: str) -> None:
    setting = SETTINGS[name]
    assert setting.help.endswith((".", "]"))
    assert setting.flag == f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_default_that_is_named_is_the_default(name: str) -> None:
    default = getattr(Settings(), name)
    named = SETTINGS[name].help.partition("[default: ")[2].rstrip("]")
    if named and default not in (None, "auto"):
        assert named == str(default)
    if SETTINGS[name].choices:
        assert default in SETTINGS[name].choices
    if SETTINGS[name].least is not None and default is not None:
        assert default >= SETTINGS[name].least


def test_nothing_given_is_the_defaults() -> None:
    assert build_settings({}, (), dict.fromkeys(SETTINGS)) == Settings()


def test_an_option_wins_over_set_and_set_over_the_recipe() -> None:
    settings = build_settings(
        {"window": 1, "sinks": 1, "samples": 1}, ("sinks=2", "samples=2"), {"samples": 3}
    )
    assert (settings.window, settings.sinks, settings.samples) == (1, 2, 3)


def test_a_later_set_wins() -> None:
    assert build_settings({}, ("window=1", "window=2"), {}).window == 2


VALUES: dict[str, Any] = {
    "source": st.text(),
    "revision": st.text(),
    "window": st.integers(),
    "sinks": st.integers(),
    "full_decode": st.booleans(),
    "layers": st.lists(st.integers()),
    "method": st.sampled_from(SETTINGS["method"].choices),
    "samples": st.integers(min_value=1),
    "seed": st.integers(min_value=0),
    "target": st.sampled_from(SETTINGS["target"].choices),
    "dtype": st.sampled_from(SETTINGS["dtype"].choices),
    "exact": st.booleans(),
    "memory": st.text(),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_good_recipe_is_taken_as_it_is(recipe: dict[str, Any]) -> None:
    settings = build_settings(recipe, (), {})
    for name, value in recipe.items():
        assert getattr(settings, name) == (tuple(value) if name == "layers" else value)


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_any_recipe_is_read_or_refused(recipe: dict[str, Any]) -> None:
    try:
        build_settings(recipe, (), {})
    except UsageError as error:
        assert all(f"{key}:" in str(error) for key in recipe if key not in SETTINGS)
    else:
        assert set(recipe) <= set(SETTINGS)


@given(st.text())
def test_any_set_is_read_or_refused(text: str) -> None:
    try:
        build_settings({}, (text,), {})
    except UsageError as error:
        assert "--set" in str(error)
    else:
        assert text.partition("=")[0].strip().replace("-", "_") in SETTINGS


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("window=64", "window", 64),
        (" window = 64 ", "window", 64),
        ("full-decode=true", "full_decode", True),
        ("full_decode=False", "full_decode", False),
        ("layers=3,7,11", "layers", (3, 7, 11)),
        ("layers=none", "layers", ()),
        ("budget=1/4", "budget", "1/4"),
        ("data=a=b.jsonl", "data", "a=b.jsonl"),
    ],
)
def test_a_set_is_parsed_by_the_kind_of_its_setting(text: str, name: str, value: object) -> None:
    assert getattr(build_settings({}, (text,), {}), name) == value


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"windw": 1}, "mine.toml: windw: there is no such setting; did you mean window?"),
        ({"qqq": 1}, "mine.toml: qqq: there is no such setting; known: source, revision,"),
        ({"window": "64"}, "mine.toml: window: expected a whole number, got '64'"),
        ({"window": True}, "mine.toml: window: expected a whole number, got True"),
        ({"window": 1.0}, "mine.toml: window: expected a whole number, got 1.0"),
        ({"budget": 4}, "mine.toml: budget: expected text, got 4"),
        ({"full_decode": "true"}, "mine.toml: full_decode: expected true or false, got 'true'"),
        ({"layers": 3}, "mine.toml: layers: expected layer numbers such as 3,7,11, got 3"),
        ({"layers": [True]}, "mine.toml: layers: expected layer numbers"),
        ({"samples": 0}, "mine.toml: samples: expected at least 1, got 0"),
        ({"target": "vlm"}, "got 'vlm'; did you mean vllm?"),
        ({"layers": [1], "budget": "1"}, "layers and budget: give one of the two"),
        ({"memory": 4}, "mine.toml: memory: expected text, got 4"),
        ({"exact": 1}, "mine.toml: exact: expected true or false, got 1"),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_with_what_was_expected(recipe: dict[str, Any], told: str) -> None:
    assert told in problems(recipe)


def test_everything_wrong_is_told_at_once() -> None:
    text = problems({"a": 1, "window": "x"}, ("b=2", "c"), {"samples": 0, "method": "guess"})
    for told in (
        "mine.toml: a",
        "mine.toml: window",
        "--set b",
        "--set c",
        "--samples",
        "--method",
    ):
        assert told in text
    assert text.startswith("these settings cannot be used\n")


def test_one_thing_wrong_is_told_on_one_line() -> None:
    assert problems({"a": 1}).startswith("a setting cannot be used\n  got: mine.toml: a: ")


def test_a_recipe_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('# for tests\nwindow = 64\nbudget = "1/4"\nlayers = [1, 2]\n')
    assert read_recipe(path) == {"window": 64, "budget": "1/4", "layers": [1, 2]}


@pytest.mark.parametrize("content", [b"window 64", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_what_is_not_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not valid TOML"):
        read_recipe(path)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        read_recipe(tmp_path / "none.toml")
