"""Hostile inputs, each with the command that is tried on it; `tests/hostile.py` runs them.

Code that ran would leave a file named RAN.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.checkpoint.reader import file_record
from tests.conftest import run_cli

RAN = "RAN"
Command = tuple[object, ...]


@dataclass(frozen=True)
class Place:
    """Where a case happens: a private copy of a model, and a folder beside it."""

    model: Path
    beside: Path

    @property
    def shard(self) -> Path:
        """The first weight file."""
        return min(self.model.glob("*.safetensors"))

    def edit(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file of the model."""
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def convert(self, *options: str) -> Command:
        """The command that converts the model."""
        chosen = ("--layers", "1", "--window", "16", *options)
        return ("convert", self.model, self.beside / "out", *chosen)

    def converted(self) -> Path:
        """A checkpoint of the model, to be damaged."""
        assert run_cli(*self.convert("-q")) == 0
        return self.beside / "out"


@dataclass(frozen=True)
class Case:
    """One hostile input, made of a family's model, and the exit status that is expected."""

    title: str
    build: Callable[[Place], Command]
    status: int
    family: str


def case(
    title: str,
    build: Callable[..., Command],
    *arguments: Any,
    status: int = 2,
    family: str = "qwen2",
    **changes: Any,
) -> Case:
    return Case(title, lambda place: build(place, *arguments, **changes), status, family)


def _inspect(place: Place) -> Command:
    return ("inspect", place.model)


def _calibrate(place: Place) -> Command:
    options = ("--method", "nll-restore", "--window", 16, "--samples", 1, "--length", 300, "-q")
    return ("calibrate", place.model, "--out", place.beside / "scores.json", *options)


def _index(place: Place, target: str) -> Command:
    path = place.model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = target
    path.write_text(json.dumps(index))
    return _inspect(place)


def _shard_parts(place: Place) -> tuple[bytes, bytes]:
    raw = place.shard.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[:end], raw[end:]


def _with_header(place: Place, change: Callable[[dict[str, Any]], bytes | None]) -> Command:
    told, data = _shard_parts(place)
    header = json.loads(told[8:])
    text = change(header) or json.dumps(header).encode()
    place.shard.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return _inspect(place)


def _some(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


def _tensors(header: dict[str, Any]) -> list[dict[str, Any]]:
    found = [entry for name, entry in header.items() if name != "__metadata__"]
    return sorted(found, key=lambda entry: int(entry["data_offsets"][0]))


def _overlap(header: dict[str, Any]) -> None:
    first, second, *_ = _tensors(header)
    second |= {key: first[key] for key in ("data_offsets", "shape")}


def _gap(header: dict[str, Any]) -> None:
    del header[_some(header)]


def _twice(header: dict[str, Any]) -> bytes:
    again = json.dumps({_some(header): header[_some(header)]})
    return f"{json.dumps(header)[:-1]}, {again[1:]}".encode()


def _first_tensor(place: Place, **changes: Any) -> Command:
    return _with_header(place, lambda header: _tensors(header)[0].update(changes))


def _header_size(place: Place, told: int, file_bytes: int) -> Command:
    place.shard.write_bytes(struct.pack("<Q", told))
    return _grown(place, place.shard.name, file_bytes)


def _linked(place: Place, name: str) -> Command:
    path = place.shard if name == "shard" else place.model / name
    shutil.move(path, place.beside / path.name)
    path.symlink_to(place.beside / path.name)
    return _inspect(place)


class Bomb:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {RAN}",))


def _pickled(place: Place, name: str) -> Command:
    for path in place.model.glob("model*"):
        path.unlink()
    (place.model / name).write_bytes(pickle.dumps(Bomb()))
    return _inspect(place)


def _config(place: Place, **changes: Any) -> Command:
    place.edit("config.json", **changes)
    return _inspect(place)


def _grown(place: Place, name: str, size: int) -> Command:
    with (place.model / name).open("ab") as file:
        file.truncate(size)
    return _inspect(place)


def _written(place: Place, name: str, text: str, run: Callable[[Place], Command]) -> Command:
    (place.model / name).write_text(text)
    return run(place)


def _template(place: Place, text: str) -> Command:
    return _written(place, "chat_template.jinja", text, _calibrate)


CODE = f"from pathlib import Path\nPath({RAN!r}).touch()\nclass Custom: pass\n"


def _remote_code(place: Place) -> Command:
    (place.model / "modeling_own.py").write_text(CODE)
    place.edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Custom"})
    return place.convert("--verify", "-q")


def _remote_tokenizer(place: Place) -> Command:
    (place.model / "tokenization_own.py").write_text(CODE)
    place.edit(
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_own.Custom"]},
        tokenizer_class="Custom",
    )
    return _calibrate(place)


def _nan_weights(place: Place, run: Callable[[Place], Command]) -> Command:
    header, data = _shard_parts(place)
    place.shard.write_bytes(header + struct.pack("<f", float("nan")) * (len(data) // 4))
    return run(place)


def _prove(place: Place) -> Command:
    return place.convert("--verify")


def _altered_code(place: Place) -> Command:
    out = place.converted()
    (out / "modeling_hybrid.py").write_text(CODE)
    return ("verify", out)


def _hidden_code(place: Place, name: str, auto_map: str | None) -> Command:
    """Code below a checkpoint, which its manifest lists as if we had written it."""
    out = place.converted()
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text(CODE)
    if auto_map is not None:
        config = json.loads((out / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = auto_map
        (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    manifest = json.loads((out / "hybrid" / "manifest.json").read_text())
    for file in (name, "config.json"):
        manifest["files"][file] = file_record(out / file, ())
    (out / "hybrid" / "manifest.json").write_text(json.dumps(manifest))
    return ("verify", out, "--against", place.model)


_PUSH = ("a/b", "--no-verify", "--base-model", "a/b", "--license", "mit")


def _push_more(place: Place) -> Command:
    out = place.converted()
    (out / "secrets.env").write_text("TOKEN=1")
    return ("push", out, *_PUSH)


def _push_linked(place: Place) -> Command:
    out = place.converted()
    (place.beside / "secret").write_text("{}")
    (out / "tokenizer_config.json").unlink()
    (out / "tokenizer_config.json").symlink_to(place.beside / "secret")
    return ("push", out, *_PUSH)


def _push_outside(place: Place) -> Command:
    out = place.converted()
    path = out / "hybrid" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"bytes": 2, "sha256": ""}
    path.write_text(json.dumps(manifest))
    (place.beside / "secret").write_text("{}")
    return ("push", out, *_PUSH)


PLAN = {
    "format_version": 1,
    "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
    "full_attention_layers": [0],
    "mask": {"window_tokens": 16, "sink_tokens": 0, "full_attention_decode": False},
    "method": "layers",
    "source": "x",
    **dict.fromkeys(("budget", "ranking", "revision")),
}


def _plan(place: Place, **changes: Any) -> Command:
    path = place.beside / "plan.json"
    path.write_text(json.dumps(PLAN | changes))
    return ("convert", place.model, place.beside / "out", "--plan", path, "-q")


def _recipe(place: Place, text: str) -> Command:
    path = place.beside / "mine.toml"
    path.write_text(text)
    return ("recipes", "check", path)


def _no_file(place: Place, name: str, make: Callable[[Path], object]) -> Command:
    """Something that is no plain file in the place of one."""
    (place.model / name).unlink(missing_ok=True)
    make(place.model / name)
    return _inspect(place)


def _device(place: Place) -> Command:
    return ("convert", place.model, place.beside / "out", "--plan", "/dev/zero", "-q")


def _measured(place: Place, name: str, **changes: Any) -> Command:
    place.edit(name, **changes)
    return _calibrate(place)


def _many_names(place: Place, count: int) -> Command:
    def add(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for entry in _tensors(header))
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
        header.update({f"model.extra.{number}.weight": empty for number in range(count)})

    return _with_header(place, add)


def _scores(place: Place, **changes: Any) -> Command:
    assert run_cli(*_calibrate(place)) == 0
    scores = json.loads((place.beside / "scores.json").read_text())
    scores["fingerprint"] |= changes
    (place.beside / "scores.json").write_text(json.dumps(scores))
    options = ("--scores", place.beside / "scores.json", "--method", "nll-restore", "-q")
    return ("convert", place.model, place.beside / "out", *options)


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
CLASSES = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
LOOPS = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
YAML_CARD = f"---\nlicense: !!python/object/apply:os.system ['touch {RAN}']\n---\n"
CASES = (
    case("index: `../../etc/passwd`", _index, "../../etc/passwd"),
    case("index: `/etc/passwd`", _index, "/etc/passwd"),
    case("index: `..\\\\x.safetensors`", _index, "..\\x.safetensors"),
    case("index: `weights.bin`", _index, "weights.bin"),
    case("shard: a symbolic link out of the folder", _linked, "shard"),
    case("config.json: a symbolic link out of the folder", _linked, "config.json"),
    case("tokenizer.json: a symbolic link out of the folder", _linked, "tokenizer.json"),
    case("shard: a header of 48 MiB", _header_size, 48 << 20, 64 << 20),
    case("shard: a header longer than the file", _header_size, 2**63, 8),
    case("shard: two tensors over the same bytes", _with_header, _overlap),
    case("shard: bytes that belong to no tensor", _with_header, _gap),
    case("shard: one name for two tensors", _with_header, _twice),
    case("shard: a shape that is not its bytes", _first_tensor, shape=[1]),
    case("shard: a shape of 2^124 elements", _first_tensor, shape=[2**62, 2**62]),
    case("shard: an unknown type of number", _first_tensor, dtype="PICKLE"),
    case("weights: a pickle that runs a command", _pickled, "pytorch_model.bin"),
    case("weights: that pickle, named model.safetensors", _pickled, "model.safetensors"),
    case("weights: not a number, measured", _nan_weights, _calibrate),
    case("weights: not a number, proved", _nan_weights, _prove, status=1),
    case("config: 10^9 layers", _config, num_hidden_layers=10**9),
    case("config: a vocabulary of 10^18", _config, vocab_size=10**18),
    case("config: 10^9 experts", _config, num_experts=10**9, family="qwen3_moe"),
    case("config: experts that are text", _config, num_experts="many", family="qwen3_moe"),
    case("config: a model type that is a path", _config, model_type="../../tmp/x"),
    case("config: objects 100,000 deep", _written, "config.json", DEEP, _inspect),
    case("config: 65 MiB", _grown, "config.json", 65 << 20),
    case("tokenizer: 129 MiB", _grown, "tokenizer.json", 129 << 20),
    case("chat template: 2 MiB", _template, "x" * (2 << 20)),
    case("chat template: reaches for Python's classes", _template, CLASSES),
    case("chat template: a string of 10^15", _template, "{{ 'x' * 1000000000000000 }}"),
    case("chat template: divides by nothing", _template, "{{ 1 // 0 }}"),
    case("chat template: reads a file", _template, "{% include '/etc/passwd' %}"),
    case("model: its own Python code", _remote_code, status=0),
    case("tokenizer: its own Python code", _remote_tokenizer, status=0),
    case(
        "card of the source: YAML that runs a command",
        *(_written, "README.md", YAML_CARD, Place.convert),
        status=0,
    ),
    case("checkpoint: other Python code than ours", _altered_code, status=1),
    case(
        "checkpoint: code in a folder of it, named by auto_map",
        *(_hidden_code, "hybrid/evil.py", "hybrid/evil.HybridForCausalLM"),
        status=1,
    ),
    case(
        "checkpoint: code in custom_generate, listed in the manifest",
        *(_hidden_code, "custom_generate/generate.py", None),
        status=1,
    ),
    case("checkpoint to push: a file the manifest does not know", _push_more),
    case("checkpoint to push: a symbolic link", _push_linked),
    case("checkpoint to push: a manifest that names `../secret`", _push_outside),
    case("plan: contradicts itself", _plan, full_attention_layers=[1]),
    case("plan: a window of -1", _plan, mask={**PLAN["mask"], "window_tokens": -1}),  # type: ignore[dict-item]
    case("plan: a ranking of 10^9", _plan, ranking=[10**9]),
    case("recipe: keys that do not exist", _recipe, 'os = "x"\nwindow = "wide"\n'),
    case("recipe: not TOML", _recipe, "window = [[["),
    case("recipe: arrays 100,000 deep", _recipe, "window = " + "[" * 100_000),
    case("config: a named pipe", _no_file, "config.json", os.mkfifo),
    case("tokenizer: a named pipe", _no_file, "tokenizer.json", os.mkfifo),
    case("tokenizer: a folder", _no_file, "tokenizer.json", os.mkdir),
    case("plan: a device", _device),
    case("chat template: a string of 10^8", _template, "{{ 'x' * 10**8 }}"),
    case("chat template: 10^10 turns of a loop", _template, LOOPS),
    case("chat template: a text doubled 40 times", _template, DOUBLED),
    case("shard: 100,000 names", _many_names, 100_000, family="qwen3", status=0),
    case("config: a number that overflows", _written, "config.json", '{"x": 1e400}', _inspect),
    case("config: half a surrogate pair", _config, rope_scaling={"type": "\ud800"}),
    case("config: an activation that does not exist", _measured, "config.json", hidden_act="x"),
    case("config: an activation that is a list", _measured, "config.json", hidden_act=[]),
    case("config: a padding token of 10^11", _measured, "config.json", pad_token_id=10**11),
    case(
        "tokenizer: a length that is text",
        *(_measured, "tokenizer_config.json"),
        model_max_length="x",
        status=0,
    ),
    case("scores: no list of methods", _scores, methods=None),
)
