"""`hybridize verify FILE.gguf`: it finds what is wrong, and survives what crashes llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from converter.common.errors import GgufError
from converter.engines.gguf.container import read_container
from converter.engines.gguf.process import ask
from converter.engines.gguf.writer import GgufModel, write_model
from converter.model.families.stock_gguf import Value, array, integer
from tests.conftest import LAYERS, run_cli
from tests.ggufs import exported, hybrid_of
from tests.hybrids import KEPT, WINDOW


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its GGUF; not to be changed."""
    root = tmp_path_factory.mktemp("verify-gguf")
    checkpoint = hybrid_of(root, "llama")
    return checkpoint, exported(checkpoint, root / "good.gguf", "--type", "f32")


def verdict(
    capsys: pytest.CaptureFixture[str], file: Path, checkpoint: Path, status: int
) -> dict[str, bool]:
    """Outcomes of the checks by name."""
    capsys.readouterr()
    assert run_cli("verify", file, "--against", checkpoint, "--json", "-q") == status
    value = json.loads(capsys.readouterr().out)
    assert value["ok"] is (status == 0)
    return {check["name"]: check["ok"] for check in value["checks"]}


def rewritten(
    file: Path, out: Path, changes: dict[str, Value | None], keep: Callable[[str], bool] = bool
) -> Path:
    """A copy with other metadata (None removes a key), and only some of the tensors."""
    container = read_container(file)
    general = {k: v for k, v in (dict(container.metadata) | changes).items() if v is not None}
    tensors = tuple(tensor for tensor in container.tensors if keep(tensor.name))
    write_model(GgufModel(container.arch, {}, general, tensors), out)
    return out


def test_a_good_file_passes(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, file = pair
    checks = verdict(capsys, file, checkpoint, 0)
    assert len(checks) == 10 and all(checks.values())


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_rounded_weights_pass_too(
    kind: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = exported(pair[0], tmp_path / "out.gguf", "--type", kind)
    checks = verdict(capsys, file, pair[0], 0)
    assert checks["rounded weights stay nearer to the hybrid than full attention"]


def test_a_plan_of_another_checkpoint_fails(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = hybrid_of(tmp_path, "llama", "--layers", "0", "--window", WINDOW)
    assert verdict(capsys, pair[1], other, 1) == {
        "the plan is the checkpoint's": False,
        "the architecture honours it": True,
        "what the file claims": True,
    }


def test_a_stock_architecture_fails(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = exported(pair[0], tmp_path / "stock.gguf", "--stock-arch")
    checks = verdict(capsys, file, pair[0], 1)
    assert [name for name, ok in checks.items() if not ok] == ["the architecture honours it"]


def swapped(file: Path, out: Path) -> Path:
    """A copy in which two matrices have each other's names."""
    names = {"blk.0.ffn_up.weight": "blk.1.ffn_up.weight"}
    names |= {new: old for old, new in names.items()}
    container = read_container(file)
    tensors = tuple(replace(t, name=names.get(t.name, t.name)) for t in container.tensors)
    write_model(GgufModel(container.arch, {}, container.metadata, tensors), out)
    return out


def test_other_weights_fail(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = verdict(capsys, swapped(pair[1], tmp_path / "swapped.gguf"), pair[0], 1)
    failed = {name for name, ok in checks.items() if not ok}
    assert failed == {"logits are the hybrid's", "greedy decoding is the hybrid's"}


def test_another_vocabulary_fails(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "tokenizer.ggml.merges"
    merges = read_container(pair[1]).metadata[key].value
    file = rewritten(pair[1], tmp_path / "out.gguf", {key: array("string", merges[1:])})
    checks = verdict(capsys, file, pair[0], 1)
    assert [name for name, ok in checks.items() if not ok] == ["tokens of sample texts"]


PATTERN = "granite_swa.attention.sliding_window_pattern"
DAMAGE: dict[str, tuple[dict[str, Value | None], str]] = {
    "another window": ({"granite_swa.attention.sliding_window": integer(25)}, "contradicts"),
    "another pattern": ({PATTERN: array("bool", [True] * LAYERS)}, "contradicts"),
    "all zero, which aborts llama.cpp": ({PATTERN: array("bool", [False] * LAYERS)}, "contradicts"),
    "no pattern": ({PATTERN: None}, "contradicts"),
    "no plan": ({"hybridize.plan": None}, "not written by hybridize"),
    "a plan that is no plan": ({"hybridize.plan": Value("string", "[]")}, "damaged"),
    "no size": ({"granite_swa.attention.head_count": None}, "lacks a size"),
    "a size of two": ({"granite_swa.block_count": integer(2)}, "another depth"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("command", ["verify", "run"])
def test_files_that_contradict_themselves_are_refused(
    command: str,
    case: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, words = DAMAGE[case]
    file = rewritten(pair[1], tmp_path / "out.gguf", changes)
    options = ("--against", pair[0]) if command == "verify" else ("--prompt", "a")
    capsys.readouterr()
    assert run_cli(command, file, *options) == 2
    assert words in capsys.readouterr().err


def test_truncated_files_and_other_architectures_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, file = pair[1].read_bytes(), tmp_path / "cut.gguf"
    for length in (0, 3, 30, 100, 5_000, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:length])
        for options in (("verify", file, "--against", pair[0]), ("run", file, "--prompt", "a")):
            capsys.readouterr()
            assert run_cli(*options) == 2
            assert "GGUF file" in capsys.readouterr().err
    for options in (("verify", "--against", pair[0]), ("run", "--prompt", "a")):
        missing = (options[0], tmp_path / "none.gguf", *options[1:])
        assert run_cli(*missing) == 2
        assert "cannot be read" in capsys.readouterr().err
    container = read_container(pair[1])
    write_model(GgufModel("gpt2", {}, container.metadata, container.tensors), file)
    assert run_cli("verify", file, "--against", pair[0]) == 2
    message = capsys.readouterr().err
    assert "'gpt2'" in message and "step35" in message


def test_a_file_that_llama_cpp_refuses_is_one_message(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rewritten(pair[1], tmp_path / "out.gguf", {}, lambda name: "blk.1.attn_q" not in name)
    for options in (("verify", file, "--against", pair[0]), ("run", file, "--prompt", "a")):
        capsys.readouterr()
        assert run_cli(*options) == 2
        message = capsys.readouterr().err
        assert "does not load this file" in message and "blk.1.attn_q.weight" in message


def test_a_file_that_aborts_llama_cpp_is_one_message(tmp_path: Path) -> None:
    """Such a pattern is refused before; here it meets llama.cpp where it can do no harm."""
    checkpoint = hybrid_of(tmp_path, "qwen3")
    good = exported(checkpoint, tmp_path / "good.gguf", "--type", "f32")
    zeros = array("bool", [False] * LAYERS)
    key = "step35.attention.sliding_window_pattern"
    file = rewritten(good, tmp_path / "out.gguf", {key: zeros})
    request = {"file": str(file), "ids": [1, 2, 3], "rows": [2], "prompt_tokens": 2}
    request |= {"new_tokens": 1, "batch_tokens": 32, "widened": None, "texts": []}
    with pytest.raises(GgufError, match=r"llama\.cpp failed") as caught:
        ask("probe", request | {"out": str(tmp_path / "out.npz")})
    assert "it aborted" in caught.value.details["got"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--against"),
        (("--against", "HYBRID", "--dtype", "float64"), "--dtype"),
        (("--against", "HYBRID", "--revision", "main"), "--revision"),
        (("--against", "."), "not a checkpoint"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(
    options: tuple[str, ...],
    words: str,
    pair: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(pair[0]) if option == "HYBRID" else option for option in options]
    capsys.readouterr()
    assert run_cli("verify", pair[1], *given) == 2
    assert words in capsys.readouterr().err


def test_changed_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A custom checkpoint needs its code; foreign code is not run without being told to."""
    checkpoint = hybrid_of(tmp_path, "olmo2")
    file = exported(checkpoint, tmp_path / "out.gguf", "--type", "f32")
    code = checkpoint / "modeling_hybrid.py"
    code.write_text(f"raise SystemExit(3)\n{code.read_text()}")
    capsys.readouterr()
    assert run_cli("verify", file, "--against", checkpoint) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    shutil.rmtree(checkpoint)


def test_the_kept_layers_are_those_of_the_plan(pair: tuple[Path, Path]) -> None:
    pattern = read_container(pair[1]).metadata[PATTERN].value
    assert [i for i, slides in enumerate(pattern) if not slides] == list(KEPT)
