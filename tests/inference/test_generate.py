"""`hybridize run`: the text is the model's own, and the figures are what was held."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from converter.inference import load
from tests.conftest import LAYERS, run_cli

PROMPT = "The quick brown fox jumps over the lazy dog, again and again and again."
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 hybrid with sinks, so that it runs through its own code."""
    out = tmp_path_factory.mktemp("run") / "hybrid"
    options = ("--layers", "1", "--window", "16", "--sinks", "2", "-q")
    assert run_cli("convert", sources["qwen3"], out, *options) == 0
    return out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    capsys.readouterr()
    assert run_cli("run", *arguments, "--json", "-q") == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_text_is_what_transformers_generates_and_the_cache_what_is_held(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(capsys, checkpoint, "--prompt", PROMPT, "--max-new", 12)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    new = output[0, ids.shape[1] :]
    assert result["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert result["prompt_tokens"] == ids.shape[1]
    assert result["new_tokens"] == len(new)
    # The cache holds window and sinks only.
    held = int(str(result["prompt_tokens"])) + int(str(result["new_tokens"])) - 1
    token = 2 * 2 * 24 * 4  # keys and values, 2 heads of 24, float32
    assert result["cache_bytes"] == token * (held + (LAYERS - 1) * (16 - 1 + 2))
    assert result["full_cache_bytes"] == token * LAYERS * held


def test_a_prompt_from_standard_input_and_streamed_text_give_the_same(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_json(capsys, checkpoint, "--prompt", PROMPT, "--max-new", 6)["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run_json(capsys, checkpoint, "--max-new", 6)["text"] == whole
    assert run_cli("run", checkpoint, "--prompt", PROMPT, "--max-new", 6) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{whole}\n"
    assert "tokens/s" in printed.err and "KV cache" in printed.err


def test_a_seed_makes_sampling_repeatable(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ("--prompt", PROMPT, "--max-new", 12, "--temperature", 5)
    first = run_json(capsys, checkpoint, *hot, "--seed", 3)["text"]
    assert run_json(capsys, checkpoint, *hot, "--seed", 3)["text"] == first
    assert run_json(capsys, checkpoint, *hot, "--seed", 4)["text"] != first


def test_chat_needs_a_template_and_keeps_the_conversation(
    checkpoint: Path,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_cli("run", checkpoint, "--chat", "--prompt", "hello") == 2
    assert "no chat template" in capsys.readouterr().err
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert run_cli("run", copied, "--chat", "--max-new", 3, "--json", "-q") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2
    first = f"<user>one<assistant>{answers[0]['text']}<user>two<assistant>"
    tokenizer = AutoTokenizer.from_pretrained(copied)
    assert answers[1]["prompt_tokens"] == len(tokenizer.encode(first))


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A private copy of the checkpoint."""
    # transformers keeps one copy of the code for a folder's name in each process.
    return Path(shutil.copytree(checkpoint, tmp_path / f"copied-{tmp_path.name}"))


def test_changed_code_is_not_run_unasked(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = copied / "modeling_hybrid.py"
    proof = copied / "it-ran"
    code.write_text(f"open({str(proof)!r}, 'w').close()\n" + code.read_text())
    assert run_cli("run", copied, "--prompt", "x", "--max-new", 2) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not proof.exists()
    assert run_cli("run", copied, "--prompt", "x", "--max-new", 2, "--trust-remote-code") == 0
    assert proof.exists()


def test_what_changes_after_the_comparison_is_not_run(
    checkpoint: Path,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files may be replaced between the comparison and the load."""
    asked, proof = ("--prompt", PROMPT, "--max-new", 6), copied / "it-ran"
    whole = run_json(capsys, checkpoint, *asked)["text"]
    compared = load.stale_code

    def replaced(folder: Path, *args: Any) -> list[str]:
        found = compared(folder, *args)
        (folder / "modeling_hybrid.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
        return found

    monkeypatch.setattr(load, "stale_code", replaced)
    assert run_json(capsys, copied, *asked)["text"] == whole
    assert not proof.exists()


def test_settings_that_ask_for_code_of_the_hub_are_told(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """These ways to generate were moved into repositories, which transformers runs with trust."""
    path = copied / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dola_layers": "high"}))
    assert run_cli("run", copied, "--prompt", "x", "--max-new", 2) == 2
    error = capsys.readouterr().err
    assert "generation settings cannot be used" in error and "generation_config.json" in error


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--prompt", ""), "the prompt cannot be used"),
        (("--prompt", "x" * 600), "600 tokens"),
        (("--prompt", "x", "--profile", "code"), "expected a profile"),
        (("--prompt", "x", "--full-layers", "2"), "not ranked"),
    ],
)
def test_bad_requests_are_told(
    checkpoint: Path, options: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("run", checkpoint, *options) == 2
    assert word in capsys.readouterr().err
