"""Plans, profiles, scores and checkpoints that are damaged or do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.bad_input.conftest import Refused, edit_json
from tests.cli.test_convert import run_json

CONVERT = "convert $SOURCE $HERE/out"
# The commands that decide from scores.
DECIDING = (
    "plan $MODEL --scores $HERE/scores.json --out $HERE/decided.json",
    "convert $MODEL $HERE/out --scores $HERE/scores.json",
)


MASK = {"window_tokens": 16, "sink_tokens": 0, "full_attention_decode": False}


def changes_id(value: object) -> str:
    return str(value)[:60] if isinstance(value, dict) else ""


# --- plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"layer_types": ["full_attention"] * 3, "full_attention_layers": [0, 1, 2]},
            ("another depth", "--plan", "4 layers", "got: 3"),
        ),
        ({"full_attention_layers": [1]}, ("contradicts itself", "[0, 2]", "[1]")),
        ({"full_attention_layers": None}, ("contradicts itself", "None")),
        ({"layer_types": None}, ("layer_types", "None")),
        ({"layer_types": "full_attention"}, ("layer_types", "'full_attention'")),
        ({"layer_types": [["full_attention"]] * 4}, ("layer_types", "full_attention")),
        ({"layer_types": ["chunked_attention"] * 4}, ("layer_types", "chunked_attention")),
        ({"layer_types": []}, ("layer_types", "[]")),
        ({"ranking": [0, 1]}, ("ranking", "every index once", "[0, 1]")),
        ({"ranking": [0, 1, 2, "3"]}, ("ranking", "every index once", "'3'")),
        ({"ranking": 3}, ("ranking", "got: 3")),
        ({"mask": None}, ("not a mask", "window_tokens, sink_tokens, full_attention_decode")),
        ({"mask": {"window_tokens": 16}}, ("not a mask", "window_tokens")),
        ({"mask": MASK | {"window_tokens": 0}}, ("window is too small",)),
        ({"mask": MASK | {"window_tokens": 1.5}}, ("window_tokens", "expected: int", "1.5")),
        ({"mask": MASK | {"window_tokens": 600}}, ("window", "below 512 tokens", "got: 600")),
        ({"format_version": 2}, ("version", "format_version 1", "got: 2")),
        ({"method": None}, ("method", "a string")),
        ({"source": 7}, ("source", "a string", "got: 7")),
        ({"budget": 4}, ("budget", "a string", "got: 4")),
        ({"revision": ["main"]}, ("revision", "a string", "['main']")),
    ],
    ids=changes_id,
)
def test_a_plan_that_cannot_be_used_is_refused(
    changes: dict[str, Any], says: tuple[str, ...], plan_file: Path, refused: Refused
) -> None:
    edit_json(plan_file, **changes)
    refused(f"{CONVERT} --plan $HERE/plan.json", *says)


@pytest.mark.parametrize("option", ["--plan", "--scores"])
def test_a_plan_or_scores_file_that_is_no_json_is_refused(
    option: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("nonsense")
    (tmp_path / "list.json").write_text("[]")
    for name, *says in (
        ("/none.json", "none.json", "No such file", "next step"),
        ("/bad.json", "not valid JSON", "bad.json", "next step"),
        ("/list.json", "JSON object", "list.json", "got: list"),
        ("", "cannot be read", "$HERE", "a folder"),
    ):
        refused(f"{CONVERT} {option} $HERE{name}", *says)


@pytest.mark.usefixtures("plan_file")
@pytest.mark.parametrize(
    "option",
    [
        *("--budget 1/2", "--layers 1", "--window 8", "--sinks 2", "--full-decode"),
        *("--method periodic", "--offset 1", "--scores scores.json"),
    ],
)
def test_a_plan_leaves_nothing_to_decide(option: str, refused: Refused) -> None:
    says = ("--plan has decided already", option.split()[0])
    refused(f"{CONVERT} --plan $HERE/plan.json {option}", *says)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("deep", ("--profile", "NAME=FILE", "deep")),
        ("=plan.json", ("--profile", "NAME=FILE", "=plan.json")),
        ("deep=", ("--profile", "NAME=FILE", "deep=")),
        ("deep=none.json", ("cannot be read", "none.json")),
    ],
)
def test_a_profile_that_cannot_be_read_is_refused(
    profile: str, says: tuple[str, ...], refused: Refused
) -> None:
    refused(f"{CONVERT} --layers 1 --profile {profile}", *says)


@pytest.mark.usefixtures("plan_file")
def test_a_profile_under_another_mask_is_refused(refused: Refused) -> None:
    refused(
        f"{CONVERT} --profile deep=$HERE/plan.json --layers 1 --window 32",
        *("another mask", "--profile deep", "expected: window 32", "got: window 16"),
    )


def test_a_given_plan_is_held_against_the_target(plan_file: Path, refused: Refused) -> None:
    edit_json(plan_file, mask=MASK | {"full_attention_decode": True})
    refused(f"{CONVERT} --plan $HERE/plan.json --target mlx", "mlx-lm", "--target")


# --- scores -----------------------------------------------------------------------------------


def test_good_scores_are_accepted(
    scores_file: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Also for a plan that measures nothing, whose mask is then that of the scores."""
    scores = ("--scores", scores_file)
    plan = ("plan", sources["qwen3"], *scores)
    assert run_json(*plan)["full_attention_layers"] == [1]
    # One layer under a window of 16, none under the default one.
    spaced = run_json(*plan, "--method", "periodic", "--budget", "kv:220000B")
    assert spaced["full_attention_layers"] == [0]
    convert = ("convert", sources["qwen3"], tmp_path / "out", *scores)
    assert run_json(*convert, "--method", "nll-restore")["plan"]["method"] == "nll-restore"
    found = run_json(*convert, "--force", "--method", "periodic", "--budget", "2")["plan"]
    assert (found["full_attention_layers"], found["mask"]["window_tokens"]) == ([0, 2], 16)


@pytest.mark.usefixtures("scores_file")
@pytest.mark.parametrize("command", DECIDING)
def test_scores_of_another_model_are_refused(
    command: str, sources: dict[str, Path], refused: Refused
) -> None:
    says = ("another model", "--scores", "fingerprint", "hybridize calibrate")
    refused(command, *says, MODEL=sources["llama"])


@pytest.mark.usefixtures("scores_file")
@pytest.mark.parametrize("command", DECIDING)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--window 8", ("another mask", "where: --window", "expected: 16", "got: 8")),
        ("--sinks 2", ("another mask", "where: --sinks", "expected: 0", "got: 2")),
        (
            "--full-decode",
            ("another mask", "where: --full-decode", "expected: False", "got: True"),
        ),
        ("--budget 9", ("budget asks for more", "0 to 4", "got: 9")),
        ("--method nll-remove", ("nll-restore", "nll-remove", "--method")),
        (
            "--method periodic --budget nll:0.1",
            ("front of a ranking", "--budget", "got: --method periodic"),
        ),
    ],
)
def test_options_that_contradict_the_scores_are_refused(
    command: str,
    options: str,
    says: tuple[str, ...],
    sources: dict[str, Path],
    refused: Refused,
) -> None:
    refused(f"{command} {options}", *says, MODEL=sources["qwen3"])


EXAMPLE = {"kind": "pair", "prompt_tokens": 9, "answer_tokens": 1, "full": 1.0, "sliding": 2.0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 7}, ("format_version 3", "format_version 7")),
        ({"format_version": 2}, ("format_version 3", "format_version 2")),
        ({"method": ["nll-restore"]}, ("format_version 3", "method ['nll-restore']")),
        ({"method": "a\x1b[2J"}, ("format_version 3", "method")),
        ({"mask": None}, ("damaged", "mask")),
        ({"mask": [16]}, ("damaged", "mask")),
        ({"per_example": None}, ("damaged", "per_example")),
        ({"per_example": []}, ("damaged",)),
        ({"per_example": [4]}, ("damaged",)),
        ({"per_example": [EXAMPLE]}, ("damaged", "scores")),
        ({"per_example": [EXAMPLE | {"scores": [1.0] * 4, "seconds": 1.0}]}, ("seconds",)),
        ({"per_example": [EXAMPLE | {"scores": 1.0}]}, ("damaged",)),
        ({"per_example": [EXAMPLE | {"scores": ["1"] * 4}]}, ("damaged", "not a finite number")),
        ({"per_example": [EXAMPLE | {"scores": [10**400] * 4}]}, ("damaged",)),
        (
            {"per_example": [EXAMPLE | {"scores": [1.0] * 3}], "order": [2, 0, 1]},
            ("another depth", "4 layers", "3"),
        ),
        ({"per_example": [EXAMPLE | {"scores": [1.0] * 3}]}, ("damaged", "not an order of 3")),
        ({"contest": {"keep": 1, "entries": []}}, ("damaged", "original")),
        ({"profiles": {"pair": [0, 1, 2]}}, ("damaged", "not an order of 4")),
        ({"per_example": [EXAMPLE | {"scores": [1.0, None, 1.0, 1.0]}]}, ("layer 1 has no score",)),
        ({"layer_forwards": "many"}, ("damaged", "many")),
        ({"per_example": [EXAMPLE | {"scores": [True] * 4}]}, ("damaged", "not a finite number")),
        ({"per_example": [EXAMPLE | {"scores": [1.0] * 4, "kind": None}]}, ("damaged", "kind")),
        (
            {"per_example": [EXAMPLE | {"scores": [1.0] * 4, "answer_tokens": "1"}]},
            ("damaged", "number of tokens"),
        ),
        ({"controls": 0.5}, ("damaged", "not iterable")),
        ({"fingerprint": {"source": "x", "methods": None}}, ("damaged", "methods")),
        ({"fingerprint": {"source": "x", "methods": [["nll-restore"]]}}, ("damaged", "methods")),
        ({"fingerprint": "abc"}, ("damaged",)),
        ({"fingerprint": None}, ("damaged", "fingerprint")),
    ],
    ids=changes_id,
)
def test_a_damaged_scores_file_is_refused(
    changes: dict[str, Any],
    says: tuple[str, ...],
    scores_file: Path,
    sources: dict[str, Path],
    refused: Refused,
) -> None:
    edit_json(scores_file, **changes)
    for command in DECIDING:
        refused(command, *says, MODEL=sources["qwen3"])


def test_a_plan_by_score_without_scores_says_how_to_get_them(refused: Refused) -> None:
    says = ("needs scores", "--scores", "hybridize calibrate", "--method periodic")
    refused("plan $SOURCE --budget 1/4 --out $HERE/plan.json", *says)


# --- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["$HERE/none", "$HERE", "$SOURCE"])
def test_verify_and_retarget_refuse_what_is_no_checkpoint(folder: str, refused: Refused) -> None:
    says = ("not a checkpoint written by hybridize", "source_config.json", "hybridize convert")
    refused(f"verify {folder}", *says, folder)
    refused(f"retarget {folder} --budget 1/2", *says, folder)


@pytest.mark.usefixtures("hybrid")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--budget 1/2", ("carries no scores", "$HERE/out", "--layers")),
        ("", ("new plan", "--budget 1/2 or --layers 3,7,11")),
        ("--layers 9", ("no such layer", "0 to 3", "got: 9")),
        ("--layers 2 --budget 1", ("layers and budget",)),
    ],
)
def test_a_retarget_that_makes_no_sense_leaves_the_checkpoint_alone(
    options: str, says: tuple[str, ...], refused: Refused
) -> None:
    refused(f"retarget $HERE/out {options}", *says)


def test_a_retarget_is_held_against_the_target(
    checkpoint: Callable[..., Path], refused: Refused, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("qwen3", "full decode"), tmp_path / "out")
    refused("retarget $HERE/out --layers 2 --target mlx", "mlx-lm", "--target")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("plan.json", "{", ("plan.json", "not valid JSON")),
        ("plan.json", "{}", ("plan.json", "format_version")),
        ("scores.json", "{}", ("scores.json", "format_version")),
        ("manifest.json", "[]", ("manifest.json", "JSON object")),
        ("manifest.json", "{}", ("manifest", "source")),
        ("source_config.json", "{", ("source_config.json", "not valid JSON")),
    ],
)
def test_a_damaged_checkpoint_is_not_retargeted(
    name: str, text: str, says: tuple[str, ...], hybrid: Path, refused: Refused
) -> None:
    (hybrid / "hybrid" / name).write_text(text)
    refused("retarget $HERE/out --budget 1/2", *says)
