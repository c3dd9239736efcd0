"""Options, `--set` and recipes that make no sense: told all at once, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.calibration.selectors import MEASURING
from converter.common.resources import recipe_names
from tests.cli.bad_input.conftest import BY_CLICK, Refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--budget 5", ("budget asks for more", "--budget", "0 to 4", "got: 5")),
        ("--budget 0/4", ("out of range", "--budget", "above 0", "got: 0/4")),
        ("--budget 3/2", ("out of range", "--budget", "at most 1", "got: 3/2")),
        ("--budget 1/0", ("cannot be read", "--budget", "'1/0'", "1/4")),
        ("--budget -1", ("cannot be read", "--budget", "'-1'")),
        ("--budget some", ("cannot be read", "--budget", "'some'", "a count")),
        ("--budget ''", ("cannot be read", "--budget", "''")),
        (f"--budget {'9' * 5000}", ("budget", "--budget")),
        ("--budget kv:2Gib@4k", ("cannot be read", "'kv:2Gib@4k'", "kv:2GiB@128k")),
        ("--budget kv:1GB@513", ("longer than the model's", "at most 512", "got: 513")),
        ("--budget kv:1B", ("even when every layer slides", "at least kv:49152B (48.0 KiB)")),
        (
            "--budget kv:786431B --full-decode",
            ("every layer keeps its whole KV cache", "at least kv:786432B", "--full-decode"),
        ),
        ("--budget nll:-1", ("out of range", "at least 0 nats", "got: nll:-1")),
        ("--budget nll:nan", ("out of range", "finite", "got: nll:nan")),
        (
            "--budget nll:0.1 --method periodic",
            ("--budget", "front of a ranking", "got: --method periodic"),
        ),
        ("--method guess", ("--method", "nll-restore", "got 'guess'")),
        ("--method serch", ("--method", "got 'serch'", "did you mean search?")),
        ("--method nll-restore,kll", ("--method", "got 'kll'", "did you mean kl?")),
        ("--method ''", ("--method", "nll-restore", "got 'nothing'")),
        ("--method nll-restore,", ("--method", "nll-restore", "got 'nothing'")),
        ("--method kl,,search", ("--method", "nll-restore", "got 'nothing'")),
        ("--method 'kl, search'", ("--method", "got ' search'", "did you mean search?")),
        ("--method search,kl,search", ("given twice", "'search,kl,search'")),
        ("--method periodic,periodic", ("given twice", "'periodic,periodic'")),
        ("--method best,search", ("best and all stand alone", "'best,search'")),
        ("--method search,all", ("best and all stand alone", "'search,all'")),
        ("--method periodic,first", ("expected one of", "nll-restore", "got 'first'")),
        ("--validation 0", ("--validation", "at least 1", "got 0")),
        ("--layers 4", ("no such layer", "--layers", "0 to 3", "got: 4")),
        ("--layers -1", ("no such layer", "--layers", "0 to 3", "got: -1")),
        ("--layers 1,1", ("named twice", "--layers", "[1, 1]")),
        ("--layers 1,two", ("--layers", "layer numbers such as 3,7,11", "'1,two'")),
        ("--layers 1,,2", ("--layers", "layer numbers", "'1,,2'")),
        ("--layers 1 --budget 1", ("layers and budget", "one of the two")),
        ("--window 0", ("--window", "at least 1", "got: 0")),
        ("--window -5", ("--window", "at least 1", "got: -5")),
        ("--window 512", ("--window", "below 512 tokens", "got: 512", "smaller")),
        ("--window 500 --sinks 12", ("--window", "window + sinks", "got: 512")),
        # The default window is 32.
        ("--sinks 480", ("--window", "window + sinks", "got: 512")),
        ("--sinks -1", ("--sinks", "0 or more", "got: -1")),
        ("--method periodic --offset 4", ("--offset", "0 to 3", "got: 4")),
        ("--method periodic --offset -1", ("--offset", "at least 0", "got -1")),
        ("--method periodic --budget 2 --offset 2", ("--offset", "0 to 1")),
        ("--target llama.cpp --sinks 4", ("llama.cpp", "--target", "leave out --sinks")),
        ("--target vllm --full-decode", ("vLLM", "--target", "leave out --sinks and --fu")),
        ("--target mlx --full-decode", ("mlx-lm", "refused", "--target")),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    options: str, says: tuple[str, ...], refused: Refused
) -> None:
    """Before anything is measured, by each command that takes the setting."""
    refused(f"convert $SOURCE $HERE/out {options}", *says)
    refused(f"plan $SOURCE --out $HERE/plan.json {options}", *says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--window 512", ("--window", "below 512 tokens")),
        ("--samples 0", ("--samples", "at least 1", "got 0")),
        ("--min-answer 0", ("--min-answer", "at least 1", "got 0")),
        ("--max-answer 0", ("--max-answer", "at least 1", "got 0")),
        ("--seed -1", ("--seed", "at least 0", "got -1")),
        ("--length 512", ("--length", "below 512", "got: 512")),
        ("--length 0", ("--length", "at least 1", "got 0")),
        ("--length 20", ("length cannot hold", "at least", "longer examples")),
        ("--device tpu", ("device", "--device", "tpu", "cpu, cuda or cuda:0")),
        ("--device meta", ("device", "--device", "meta", "cpu, cuda or cuda:0")),
        ("--device ''", ("device", "--device", "cpu, cuda or cuda:0")),
        ("--device spread --memory 1GB", ("--device spread", "also --memory")),
        ("--memory lots", ("--memory", "4GB or 2GiB", "'lots'")),
        ("--memory 0GB", ("--memory", "4GB or 2GiB", "'0GB'")),
        ("--budget 9", ("budget asks for more", "0 to 4", "got: 9")),
        ("--budget kv:1B", ("even when every layer slides", "at least kv:49152B")),
        ("--method periodic", ("measures nothing", "--method", ", ".join(MEASURING))),
    ],
)
def test_a_setting_that_cannot_be_measured_with_is_refused(
    options: str, says: tuple[str, ...], refused: Refused
) -> None:
    refused(f"calibrate $SOURCE --out $HERE/scores.json {options}", *says)


def test_convert_without_an_output_is_refused(refused: Refused) -> None:
    for command in ("convert", "convert $SOURCE"):
        refused(command, "say what to convert", "expected: SOURCE OUT")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("conver", "conver"),
        ("inspect", "SOURCE"),
        ("inspect a b", "unexpected extra argument"),
        ("plan a --bugdet 1", "--budget"),
        ("plan a --window wide", "not a valid integer"),
        ("plan a --context 0", "--context"),
        ("calibrate a", "--out"),
        ("calibrate a --out", "--out"),
        ("convert a b --target ollama", "llama.cpp"),
        ("convert a b --dtype int4", "bfloat16"),
        ("recipes chek a", "chek"),
        ("verify a --dtype auto", "float64"),
    ],
)
def test_wrong_usage_is_refused(arguments: str, says: str, refused: Refused) -> None:
    refused(arguments, says, begins=BY_CLICK)


# --- recipes and --set ------------------------------------------------------------------------


def test_an_unknown_recipe_is_refused_with_the_nearest_name(refused: Refused) -> None:
    name = recipe_names()[0]
    says = ("no such recipe", f"where: {name}x", *recipe_names(), f"did you mean {name}?")
    refused(f"recipes show {name}x", *says)


@pytest.mark.parametrize(
    "command",
    [
        "convert $SOURCE $HERE/out --recipe",
        "plan $SOURCE --recipe",
        "calibrate $SOURCE --out $HERE/s.json --recipe",
        "recipes check",
    ],
)
def test_an_unknown_recipe_is_refused_by_every_command_that_takes_one(
    command: str, refused: Refused
) -> None:
    refused(f"{command} zzz.toml", "no such recipe", "zzz.toml", "a file")
    refused(f"{command} $HERE", "no such recipe", "$HERE", "a file")


def test_everything_wrong_is_told_at_once(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'windw = 16\nbudgett = "1/4"\nsamples = "many"\nmethod = "nll-restor"\nseed = -1\n'
        'layers = ["a"]\nfull_decode = 1\nzzzzzz = 1\n'
    )
    says = (
        "these settings cannot be used",
        "mine.toml: windw: there is no such setting; did you mean window?",
        "mine.toml: budgett: there is no such setting; did you mean budget?",
        "mine.toml: samples: expected a whole number, got 'many'",
        "mine.toml: method: expected one of",
        "did you mean nll-restore?",
        "mine.toml: seed: expected at least 0, got -1",
        "mine.toml: layers: expected layer numbers",
        "mine.toml: full_decode: expected true or false, got 1",
        "mine.toml: zzzzzz: there is no such setting; known: source, revision,",
    )
    refused("recipes check $HERE/mine.toml", *says)
    refused(
        "convert $SOURCE $HERE/out --recipe $HERE/mine.toml --set b=2 --set c --layers x "
        "--samples 0 --seed -3 --holdout -1",
        *says,
        "--set b: there is no such setting",
        "--set c: expected key=value",
        "--layers: expected layer numbers such as 3,7,11, got 'x'",
        "--samples: expected at least 1, got 0",
        "--seed: expected at least 0, got -3",
        "--holdout: expected at least 0, got -1",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"window 16", "line 1"), (b"\xff\xfe", "utf-8"), (b"a = 1\na = 2\n", "line 2")],
)
def test_a_recipe_that_is_not_toml_is_refused(
    content: bytes, says: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    refused("recipes check $HERE/mine.toml", "not valid TOML", "mine.toml", says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("windw=8", "--set windw: there is no such setting; did you mean window?"),
        ("window", "--set window: expected key=value"),
        ("window=wide", "--set window: expected a whole number, got 'wide'"),
        ("full-decode=maybe", "--set full_decode: expected true or false, got 'maybe'"),
        ("=8", "there is no such setting"),
    ],
)
def test_a_set_that_makes_no_sense_is_refused(text: str, says: str, refused: Refused) -> None:
    refused(f"convert $SOURCE $HERE/out --set {text}", says)
