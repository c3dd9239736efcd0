"""What `tests/fuzz.py` damages: a file of each kind, and the commands that read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from converter.checkpoint.reader import open_checkpoint
from converter.checkpoint.verify.static import static_checks
from converter.model.source import open_source
from converter.model.weights import INDEX_NAME, find_weights
from converter.publish.push import prepare
from tests import mutations
from tests.conftest import FAMILIES, MORE_FAMILIES, make_model, run_cli
from tests.ggufs import make_bpe_tokenizer

Command = Callable[[Path], tuple[object, ...]]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
MODELS = {**FAMILIES, **MORE_FAMILIES}
_MEASURE = ("--method", "nll-restore", "--window", 16, "--samples", 2, "--length", 420, "-q")


def _calibrate(*options: object) -> Command:
    return lambda place: ("calibrate", place / "model", "--out", "s.json", *_MEASURE, *options)


def _convert(*options: object) -> Command:
    return lambda place: ("convert", place / "model", "out", *options, "-q")


def _inspect(place: Path) -> tuple[object, ...]:
    return ("inspect", place / "model", "-q")


def _calibrate_rows(place: Path) -> tuple[object, ...]:
    return _calibrate("--data", place / "extra" / "rows.jsonl")(place)


def _plan(place: Path) -> tuple[object, ...]:
    given = ("--scores", place / "extra" / "scores.json", "--budget", "1/2", "--out", "p.json")
    return ("plan", place / "model", *given, "-q")


def _by_curve(place: Path) -> tuple[object, ...]:
    given = ("--curve", place / "extra" / "curve.json", "--picture", "curve.png")
    return ("plan", place / "model", *given, "-q")


def _by_scores(place: Path) -> tuple[object, ...]:
    return _convert("--scores", place / "extra" / "scores.json")(place)


def _by_plan(place: Path) -> tuple[object, ...]:
    return _convert("--plan", place / "extra" / "plan.json")(place)


def _by_recipe(place: Path) -> tuple[object, ...]:
    return _convert("--recipe", place / "extra" / "recipe.toml", "--layers", "1")(place)


def _check_recipe(place: Path) -> tuple[object, ...]:
    return ("recipes", "check", place / "extra" / "recipe.toml")


def _retarget(place: Path) -> tuple[object, ...]:
    return ("retarget", place / "checkpoint", "--budget", "1/2", "-q")


def _push(place: Path) -> tuple[object, ...]:
    return ("prepare", place / "checkpoint")


def _export(place: Path) -> tuple[object, ...]:
    return ("export", place / "checkpoint", "out.gguf", "--type", "f16", "-q")


def _fit(place: Path) -> tuple[object, ...]:
    given = (place / "extra" / "stock.gguf", "--plan", place / "extra" / "plan.json", "out.gguf")
    return ("export", "--from-gguf", *given, "-q")


def _static(place: Path) -> tuple[object, ...]:
    return ("static", place / "checkpoint", place / "model")


def _prove(place: Path) -> tuple[object, ...]:
    return ("verify", place / "checkpoint", "-q")


def _chat(place: Path) -> tuple[object, ...]:
    given = ("--prompt", "Give Amber", "--chat", "--max-new", 2)
    return ("run", place / "checkpoint", *given, "-q")


def _evaluate(place: Path) -> tuple[object, ...]:
    rows = ("--tasks", "none", "--rows", place / "extra" / "rows.jsonl", "--speed-runs", 0)
    return ("evaluate", place / "model", *rows, "--out", "report", "-q")


def static(checkpoint: str, model: str) -> int:
    """What `verify --against` looks at before it runs a model."""
    source, plan = open_checkpoint(Path(checkpoint))
    list(static_checks(Path(checkpoint), source, plan, open_source(model)))
    return 0


def prepared(checkpoint: str) -> int:
    """What `push` looks at before it calls the Hub."""
    prepare(Path(checkpoint), "a/b", base_model="a/b", licence="mit")
    return 0


# Parts of commands, which take the network or seconds of time as a whole.
PARTS: dict[str, Callable[..., int]] = {"static": static, "prepare": prepared}


_LAYERS = _convert("--layers", "1", "--window", 16)


@dataclass(frozen=True)
class Kind:
    """A file to damage.

    Attributes:
        places: the folders that the commands need, of `make_bases`.
        file: the one to damage, in one of them.
    """

    name: str
    places: tuple[str, ...]
    file: str
    damage: mutations.Mutator
    commands: tuple[Command, ...]

    def bases(self, random: Random) -> list[str]:
        """The folders to copy; a model of any family, where that is what is damaged."""
        family = random.choice(sorted(MODELS)) if self.name == "config" else "qwen3"
        family = "chat" if self.name == "template" else family
        return [f"model-{family}" if place == "model" else place for place in self.places]


_JSON, _MODEL, _EXTRA, _OUR = mutations.json_of, ("model",), ("model", "extra"), ("checkpoint",)
_PAIR, _RUN = ("checkpoint", "model"), _calibrate()
_OFTEN = (_static,) * 4
_CONFIG = Kind("config", _MODEL, "model/config.json", _JSON, (_inspect, _LAYERS, _RUN, _RUN))


def _own(name: str, file: str, *commands: Command) -> Kind:
    return Kind(name, _PAIR, f"checkpoint/{file}", _JSON, (_retarget, *commands))


def _exported(name: str, file: str) -> Kind:
    return Kind(f"{name}, exported", _OUR, f"checkpoint/{file}", _JSON, (_export,))


KINDS = (
    *(_CONFIG, _CONFIG, _CONFIG, _CONFIG, _CONFIG),
    Kind("generation", _MODEL, "model/generation_config.json", _JSON, (_LAYERS, _RUN)),
    Kind("tokenizer", _MODEL, "model/tokenizer.json", _JSON, (_RUN,)),
    Kind("tokenizer config", _MODEL, "model/tokenizer_config.json", _JSON, (_RUN,)),
    Kind("special tokens", _MODEL, "model/special_tokens_map.json", _JSON, (_RUN,)),
    Kind("template", _MODEL, "model/chat_template.jinja", mutations.template_of, (_RUN,)),
    Kind(
        "weights", _MODEL, "model/model.safetensors", mutations.header_of, (_inspect, _LAYERS, _RUN)
    ),
    Kind("index", _MODEL, "model/model.safetensors.index.json", _JSON, (_inspect, _LAYERS)),
    Kind("data rows", _EXTRA, "extra/rows.jsonl", mutations.lines_of, (_calibrate_rows, _evaluate)),
    Kind("scores", _EXTRA, "extra/scores.json", _JSON, (_plan, _by_scores)),
    _own("scores", "hybrid/scores.json"),
    Kind("curve", _EXTRA, "extra/curve.json", _JSON, (_by_curve,)),
    Kind("plan", _EXTRA, "extra/plan.json", _JSON, (_by_plan,)),
    _own("plan", "hybrid/plan.json", _static),
    Kind("recipe", _EXTRA, "extra/recipe.toml", mutations.toml_of, (_check_recipe, _by_recipe)),
    _own("manifest", "hybrid/manifest.json", _static, _push),
    _own("quality", "hybrid/quality.json", _static, _push),
    _own("source config", "hybrid/source_config.json", *_OFTEN, _prove),
    _own("checkpoint config", "config.json", *_OFTEN, _push, _prove),
    Kind("generation, run", _OUR, "checkpoint/generation_config.json", _JSON, (_chat,)),
    Kind("tokenizer, run", _OUR, "checkpoint/tokenizer_config.json", _JSON, (_chat,)),
    _exported("tokenizer", "tokenizer.json"),
    _exported("tokenizer config", "tokenizer_config.json"),
    _exported("source config", "hybrid/source_config.json"),
    Kind("GGUF", ("extra",), "extra/stock.gguf", mutations.bytes_of, (_fit,)),
)


def make_bases(root: Path) -> None:
    """Good inputs, by the very commands that will read them damaged."""
    for family in MODELS:
        folder = make_model(root / f"model-{family}", family, vocab_size=288)
        make_bpe_tokenizer(folder, model_max_length=512, pad_token="<|end|>")  # noqa: S106
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    weights = dict.fromkeys(find_weights(root / "model-qwen3").tensors, "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (root / "model-qwen3" / INDEX_NAME).write_text(json.dumps(index))
    chat = shutil.copytree(root / "model-qwen3", root / "model-chat")
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    model, extra, checkpoint = root / "model-qwen3", root / "extra", root / "checkpoint"
    extra.mkdir()
    rows = [{"prompt": "Give Amber drums. " * 9 + "Give Amber", "answer": " drums"}] * 3
    (extra / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = 'method = "nll-restore"\nwindow = 16\nsinks = 2\nlength = 420\nsamples = 2\n'
    (extra / "recipe.toml").write_text(f"# expected: little\n# measured: no\n{recipe}")
    scores, options = extra / "scores.json", ("--holdout", 2, "--no-verify")
    for command in (
        ("calibrate", model, "--out", scores, *_MEASURE, "--budget", "1/2"),
        ("convert", chat, checkpoint, *_MEASURE, "--budget", "1/2", *options),
        ("export", checkpoint, extra / "stock.gguf", "--type", "f16", "--stock-arch", "-q"),
    ):
        assert run_cli(*command) == 0, command
    for name in ("plan.json", "curve.json"):
        shutil.copy(checkpoint / "hybrid" / name, extra / name)
