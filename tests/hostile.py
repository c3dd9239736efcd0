"""Hostile inputs, each with the command that is tried on it, and what it says.

    python -m tests.hostile

runs them all and writes the table of docs/trust.md; `tests/test_hostile.py` runs them and compares.
A case may leave a trace only where a command writes on purpose: code that ran would leave a file
named RAN.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import make_model, run_cli

PAGE = Path(__file__).parent.parent / "docs" / "trust.md"
BEGIN, END = "<!-- table: python -m tests.hostile -->\n", "<!-- end of table -->\n"
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

    def converted(self, *options: object) -> Path:
        """A checkpoint of the model, to be damaged."""
        out = self.beside / "out"
        arguments = ("--layers", "1", "--window", "16", "-q", *options)
        assert run_cli("convert", self.model, out, *arguments) == 0
        return out


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        title: what it is.
        build: makes it, and says what to run.
        status: the exit status that is expected.
        family: which model it starts from.
    """

    title: str
    build: Callable[[Place], Command]
    status: int = 2
    family: str = "qwen2"


def _inspect(place: Place) -> Command:
    return ("inspect", place.model)


def _calibrate(place: Place) -> Command:
    options = ("--method", "nll-restore", "--window", 16, "--samples", 1, "--length", 300, "-q")
    return ("calibrate", place.model, "--out", place.beside / "scores.json", *options)


def _index(target: str) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        path = place.model / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = target
        path.write_text(json.dumps(index))
        return _inspect(place)

    return build


def _with_header(
    change: Callable[[dict[str, Any]], bytes | None],
) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        shard = place.shard
        raw = shard.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        text = change(header) or json.dumps(header).encode()
        shard.unlink()
        shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
        return _inspect(place)

    return build


def _tensors(header: dict[str, Any]) -> list[dict[str, Any]]:
    found = [entry for name, entry in header.items() if name != "__metadata__"]
    return sorted(found, key=lambda entry: int(entry["data_offsets"][0]))


def _overlap(header: dict[str, Any]) -> None:
    first, second, *_ = _tensors(header)
    second["data_offsets"] = first["data_offsets"]
    second["shape"] = first["shape"]


def _gap(header: dict[str, Any]) -> None:
    name = next(name for name in header if name != "__metadata__")
    del header[name]


def _twice(header: dict[str, Any]) -> bytes:
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    return (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode()


def _lying_shape(header: dict[str, Any]) -> None:
    _tensors(header)[0]["shape"] = [1]


def _endless_shape(header: dict[str, Any]) -> None:
    _tensors(header)[0]["shape"] = [2**62, 2**62]


def _own_dtype(header: dict[str, Any]) -> None:
    _tensors(header)[0]["dtype"] = "PICKLE"


def _large_header(place: Place) -> Command:
    shard = place.shard
    shard.unlink()
    with shard.open("wb") as file:
        file.write(struct.pack("<Q", 48 << 20))
        file.truncate(64 << 20)
    return _inspect(place)


def _short_file(place: Place) -> Command:
    shard = place.shard
    shard.unlink()
    shard.write_bytes(struct.pack("<Q", 2**63))
    return _inspect(place)


def _linked(name: str) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        path = place.shard if name == "shard" else place.model / name
        shutil.move(path, place.beside / path.name)
        path.symlink_to(place.beside / path.name)
        return _inspect(place)

    return build


class _Bomb:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {RAN}",))


def _pickled(name: str) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        for path in place.model.glob("model*"):
            path.unlink()
        (place.model / name).write_bytes(pickle.dumps(_Bomb()))
        return _inspect(place)

    return build


def _config(**changes: Any) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        place.edit("config.json", **changes)
        return _inspect(place)

    return build


def _deep_config(place: Place) -> Command:
    (place.model / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return _inspect(place)


def _grown(name: str, size: int) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        with (place.model / name).open("ab") as file:
            file.truncate(size)
        return _inspect(place)

    return build


def _template(text: str) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        (place.model / "chat_template.jinja").write_text(text)
        return _calibrate(place)

    return build


_CODE = f"from pathlib import Path\nPath({RAN!r}).touch()\nclass Custom: pass\n"


def _remote_code(place: Place) -> Command:
    (place.model / "modeling_own.py").write_text(_CODE)
    place.edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Custom"})
    options = ("--layers", "1", "--window", "16", "--verify", "-q")
    return ("convert", place.model, place.beside / "out", *options)


def _remote_tokenizer(place: Place) -> Command:
    (place.model / "tokenization_own.py").write_text(_CODE)
    place.edit(
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_own.Custom"]},
        tokenizer_class="Custom",
    )
    return _calibrate(place)


def _nan_weights(run: Callable[[Place], Command]) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        shard = place.shard
        raw = bytearray(shard.read_bytes())
        (size,) = struct.unpack("<Q", raw[:8])
        raw[8 + size :] = struct.pack("<f", float("nan")) * ((len(raw) - 8 - size) // 4)
        shard.unlink()
        shard.write_bytes(raw)
        return run(place)

    return build


def _convert_and_prove(place: Place) -> Command:
    options = ("--layers", "1", "--window", "16", "--verify")
    return ("convert", place.model, place.beside / "out", *options)


def _altered_code(place: Place) -> Command:
    out = place.converted()
    (out / "modeling_hybrid.py").write_text(_CODE)
    return ("verify", out)


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


def _file(name: str, text: str, *command: str) -> Callable[[Place], Command]:
    def build(place: Place) -> Command:
        path = place.beside / name
        path.write_text(text)
        filled = [{"FILE": path, "MODEL": place.model}.get(word, word) for word in command]
        return tuple(place.beside / "out" if word == "OUT" else word for word in filled)

    return build


PLAN: dict[str, Any] = {
    "format_version": 1,
    "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
    "full_attention_layers": [0],
    "mask": {"window_tokens": 16, "sink_tokens": 0, "full_attention_decode": False},
    "method": "layers",
    "budget": None,
    "ranking": None,
    "source": "x",
    "revision": None,
}


def _plan(**changes: Any) -> Callable[[Place], Command]:
    text = json.dumps(PLAN | changes)
    return _file("plan.json", text, "convert", "MODEL", "OUT", "--plan", "FILE", "-q")


def _recipe(text: str) -> Callable[[Place], Command]:
    return _file("mine.toml", text, "recipes", "check", "FILE")


def _yaml_card(place: Place) -> Command:
    (place.model / "README.md").write_text(
        f"---\nlicense: !!python/object/apply:os.system ['touch {RAN}']\n---\n"
    )
    options = ("--layers", "1", "--window", "16", "-q")
    return ("convert", place.model, place.beside / "out", *options)


CASES = (
    Case("index: `../../etc/passwd`", _index("../../etc/passwd")),
    Case("index: `/etc/passwd`", _index("/etc/passwd")),
    Case("index: `..\\\\x.safetensors`", _index("..\\x.safetensors")),
    Case("index: `weights.bin`", _index("weights.bin")),
    Case("shard: a symbolic link out of the folder", _linked("shard")),
    Case("config.json: a symbolic link out of the folder", _linked("config.json")),
    Case("tokenizer.json: a symbolic link out of the folder", _linked("tokenizer.json")),
    Case("shard: a header of 48 MiB", _large_header),
    Case("shard: a header longer than the file", _short_file),
    Case("shard: two tensors over the same bytes", _with_header(_overlap)),
    Case("shard: bytes that belong to no tensor", _with_header(_gap)),
    Case("shard: one name for two tensors", _with_header(_twice)),
    Case("shard: a shape that is not its bytes", _with_header(_lying_shape)),
    Case("shard: a shape of 2^124 elements", _with_header(_endless_shape)),
    Case("shard: an unknown type of number", _with_header(_own_dtype)),
    Case("weights: a pickle that runs a command", _pickled("pytorch_model.bin")),
    Case("weights: that pickle, named model.safetensors", _pickled("model.safetensors")),
    Case("weights: not a number, measured", _nan_weights(_calibrate)),
    Case("weights: not a number, proved", _nan_weights(_convert_and_prove), 1),
    Case("config: 10^9 layers", _config(num_hidden_layers=10**9)),
    Case("config: a vocabulary of 10^18", _config(vocab_size=10**18)),
    Case("config: 10^9 experts", _config(num_experts=10**9), family="qwen3_moe"),
    Case("config: experts that are text", _config(num_experts="many"), family="qwen3_moe"),
    Case("config: a model type that is a path", _config(model_type="../../tmp/x")),
    Case("config: objects 100,000 deep", _deep_config),
    Case("config: 65 MiB", _grown("config.json", 65 << 20)),
    Case("tokenizer: 129 MiB", _grown("tokenizer.json", 129 << 20)),
    Case("chat template: 2 MiB", _template("x" * (2 << 20))),
    Case(
        "chat template: reaches for Python's classes",
        _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ),
    Case("chat template: a string of 10^15", _template("{{ 'x' * 1000000000000000 }}")),
    Case("chat template: divides by nothing", _template("{{ 1 // 0 }}")),
    Case("chat template: reads a file", _template("{% include '/etc/passwd' %}")),
    Case("model: its own Python code", _remote_code, 0),
    Case("tokenizer: its own Python code", _remote_tokenizer, 0),
    Case("card of the source: YAML that runs a command", _yaml_card, 0),
    Case("checkpoint: other Python code than ours", _altered_code, 1),
    Case("checkpoint to push: a file the manifest does not know", _push_more),
    Case("checkpoint to push: a symbolic link", _push_linked),
    Case("checkpoint to push: a manifest that names `../secret`", _push_outside),
    Case("plan: contradicts itself", _plan(full_attention_layers=[1])),
    Case("plan: a window of -1", _plan(mask={**PLAN["mask"], "window_tokens": -1})),
    Case("plan: a ranking of 10^9", _plan(ranking=[10**9])),
    Case("recipe: keys that do not exist", _recipe('os = "x"\nwindow = "wide"\n')),
    Case("recipe: not TOML", _recipe("window = [[[")),
    Case("recipe: arrays 100,000 deep", _recipe("window = " + "[" * 100_000)),
)


def outcome(case: Case, source: Path, root: Path) -> tuple[int, str, Place]:
    """Run a case on a copy of a model; its exit status and what it said, without places."""
    place = Place(root / "model", root / "beside")
    shutil.copytree(source, place.model)
    place.beside.mkdir()
    stderr, before = io.StringIO(), Path.cwd()
    os.chdir(place.beside)
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            status = run_cli(*case.build(place))
    finally:
        os.chdir(before)
    return status, summary(stderr.getvalue(), root), place


def summary(text: str, root: Path) -> str:
    """What a message says, in one line that is the same on every machine."""
    lines = [line for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if line.startswith(("error: ", "  got: ", "FAILED"))]
    line = "; ".join(line.strip().removeprefix("error: ") for line in kept)
    line = line.replace(f"{root}{os.sep}", "").replace(str(root), "")
    line = re.sub(r"0x[0-9a-f]+", "0x…", line)
    return (line if len(line) <= 180 else f"{line[:179]}…").replace("|", "\\|") or "done"


def table(rows: list[tuple[Case, int, str]]) -> str:
    """The rows as Markdown."""
    lines = ["| input | exit | what was said |", "|---|---|---|"]
    lines += [row(case, status, said) for case, status, said in rows]
    return "\n".join(lines) + "\n"


def row(case: Case, status: int, said: str) -> str:
    """One row of the table."""
    return f"| {case.title} | {status} | {said} |"


def main() -> None:
    """Run every case and rewrite the table."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        families = {case.family for case in CASES}
        sources = {name: make_model(root / name, name, shards=name == "qwen2") for name in families}
        for number, case in enumerate(CASES):
            status, said, place = outcome(case, sources[case.family], root / str(number))
            assert status == case.status, (case.title, status, said)
            assert not list(place.beside.rglob(RAN)), case.title
            rows.append((case, status, said))
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(text[:begin] + table(rows) + text[end:], encoding="utf-8")
    print(table(rows), file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
