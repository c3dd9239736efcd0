"""Settings: one table, three places to give them, every mistake told at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.common.errors import UsageError
from converter.common.resources import read_recipe
from converter.engines.support import TARGETS
from converter.model.dimensions import ModelDimensions
from converter.settings import SETTINGS, Settings, build_settings


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_of_the_table_fits_its_field_and_its_option(name: str) -> None:
    setting, hint, default = (
        SETTINGS[name],
        get_type_hints(Settings)[name],
        getattr(Settings(), name),
    )
    kind = tuple[int, ...] if setting.kind is tuple else setting.kind
    assert hint == kind or kind in get_args(hint)
    assert setting.flag == f"--{name.replace('_', '-')}"
    assert setting.help.endswith((".", "]"))
    named = setting.help.partition("[default: ")[2].rstrip("]")
    if named and default not in (None, "auto"):
        assert named == str(default)
    if setting.choices and default is not None:
        assert default in setting.choices
    if setting.least is not None and default is not None:
        assert default >= setting.least


def test_an_option_wins_over_a_later_set_over_an_earlier_one_over_the_recipe() -> None:
    recipe = {"window": 1, "sinks": 1, "samples": 1, "seed": 1}
    overrides, unset = ("sinks=2", "samples=2", "seed=2", "seed=3"), dict.fromkeys(SETTINGS)
    settings = build_settings(recipe, overrides, unset | {"samples": 4})
    assert settings == Settings(window=1, sinks=2, samples=4, seed=3)
    assert build_settings({}, (), unset) == Settings()


KNOWN = ", ".join(TARGETS)
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
        ({"window": "64"}, "window: expected a whole number, got '64'"),
        ({"window": True}, "window: expected a whole number, got True"),
        ({"window": 1.0}, "window: expected a whole number, got 1.0"),
        ({"budget": 4}, "budget: expected text, got 4"),
        ({"full_decode": "true"}, "full_decode: expected true or false, got 'true'"),
        ({"layers": 3}, "layers: expected layer numbers such as 3,7,11, got 3"),
        ({"layers": [True]}, "layers: expected layer numbers"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        (
            {"target": "vlm"},
            f"target: expected one of {', '.join(TARGETS)}, got 'vlm'; did you mean vllm?",
        ),
        ({"memory": 4}, "memory: expected text, got 4"),
        ({"exact": 1}, "exact: expected true or false, got 1"),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_with_what_was_expected(recipe: dict[str, Any], told: str) -> None:
    """On one line where it is alone; several, and `--set`, are in tests/cli/bad_input."""
    with pytest.raises(UsageError) as caught:
        build_settings(recipe, (), {}, "mine.toml")
    assert str(caught.value).startswith(f"a setting cannot be used\n  got: mine.toml: {told}")


def test_a_recipe_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('# for tests\nwindow = 64\nbudget = "1/4"\nlayers = [1, 2]\n')
    assert read_recipe(path) == {"window": 64, "budget": "1/4", "layers": [1, 2]}


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        read_recipe(tmp_path / "none.toml")


def test_a_quick_look_takes_less_where_nothing_else_is_said() -> None:
    shape = ModelDimensions(4, 64, 4, 2, 16, 96, 320, 32768, 2)
    plain, quick = (build_settings({}, (), {"quick": q}) for q in (None, True))
    assert [plain.samples, plain.validation, plain.holdout] == [64, 128, 32]
    assert [quick.samples, quick.validation, quick.holdout] == [16, 16, 16]
    assert plain.prompt_tokens(shape) == 16384
    # Two windows, so that something is out of sight; never more than a run in earnest has.
    assert quick.mask(shape) == plain.mask(shape)
    assert quick.prompt_tokens(shape) == 4096
    assert replace(quick, window=16).prompt_tokens(shape) == 512
    assert replace(quick, window=16000).prompt_tokens(shape) == 16384
    said = build_settings({"samples": 5}, (), {"quick": True, "length": 900})
    assert (said.samples, said.prompt_tokens(shape)) == (5, 900)


def test_a_loss_bound_may_keep_every_layer_that_attends_fully_in_the_model_itself() -> None:
    plain = ModelDimensions(4, 64, 4, 2, 16, 96, 320, 32768, 2)
    mixed = replace(plain, kinds=("linear_attention", "full_attention") * 2)
    assert Settings(budget="nll:0.1").kept(plain) == 4
    assert Settings(budget="nll:0.1").kept(mixed) == 2
