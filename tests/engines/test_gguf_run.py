"""`hybridize run FILE.gguf`: the hybrid's own text, from a cache that is small and clean."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from converter.common.errors import GgufError
from converter.engines.gguf.container import read_container
from converter.engines.gguf.hybrid_file import open_hybrid
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from converter.engines.gguf.run import GgufRunner, fitting_context
from converter.inference.completion import Completion, GenerationSettings
from tests.conftest import CONTEXT, LAYERS, run_cli
from tests.ggufs import Files, Pair, Refused, Told, exported, hybrid_of

PROMPT = "The quick brown fox jumps over the lazy dog, again and again and again. "
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)
TOKEN = 2 * 2 * 24 * 2  # keys and values, 2 heads of 24, float16


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With a long context and a chat template."""
    root = tmp_path_factory.mktemp("run-gguf")
    checkpoint = hybrid_of(root, "qwen3", max_position_embeddings=4 * CONTEXT)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    return checkpoint, exported(checkpoint, root / "out.gguf", "--type", "f32")


@pytest.fixture(scope="module")
def transformers_text(pair: Pair) -> Any:
    """Greedy continuations by transformers: `text(prompt, count)`."""
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pair[0])

    def text(prompt: str, count: int) -> str:
        ids = torch.tensor([tokenizer.encode(prompt)])
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    return text


def test_the_text_is_the_hybrids(
    pair: Pair, transformers_text: Any, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("run", pair[1], "--prompt", PROMPT * 8, "--max-new", 60)
    result = told(*command)
    assert (result["text"], result["new_tokens"]) == (transformers_text(PROMPT * 8, 60), 60)
    # It comes in pieces; bytes of one letter may come in several tokens.
    assert run_cli(*command, "-q") == 0
    assert capsys.readouterr().out == str(result["text"]) + "\n"


def test_an_earlier_prompt_leaves_nothing_behind(pair: Pair, transformers_text: Any) -> None:
    start = PROMPT * 6
    with GgufRunner(pair[1], GenerationSettings(8), context_tokens=1024, warn=print) as runner:
        for prompt in (start + "one", start + "two", start, start, "two"):
            done = runner.complete(prompt, is_chat=False, show=lambda _piece: None)
            assert done.text == transformers_text(prompt, 8), prompt[-12:]


def test_the_cache_is_the_plans(pair: Pair, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("run", pair[1], "--prompt", "a", "--max-new", 2)
    result = told(*command)
    # A window of 24 and a batch of 512, padded to 256.
    full, sliding = 4 * CONTEXT, 768
    assert result["cache_bytes"] == TOKEN * (2 * full + 2 * sliding)
    assert result["full_cache_bytes"] == TOKEN * LAYERS * full
    assert result["prompt_tokens"] == 1
    assert run_cli(*command, "--context", "900") == 0
    printed = capsys.readouterr().err
    assert all(words in printed for words in ("room for 900 tokens", "KV cache", "tokens/s"))


def test_sampling_is_repeatable_and_varies_with_the_seed(pair: Pair, told: Told) -> None:
    warm = ("run", pair[1], "--prompt", PROMPT, "--max-new", 12, "--temperature", "1.5")
    first, again, other = (told(*warm, "--seed", seed)["text"] for seed in (1, 1, 2))
    assert first == again != other


def test_the_file_says_how_to_draw_where_the_user_does_not(
    pair: Pair, tmp_path: Path, told: Told
) -> None:
    checkpoint = Path(shutil.copytree(pair[0], tmp_path / "hybrid"))
    path = checkpoint / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"do_sample": True, "temperature": 3.0, "top_p": "no"}))
    file = exported(checkpoint, tmp_path / "out.gguf", "--type", "f32")
    keys = read_container(file).metadata
    found = {key: value.value for key, value in keys.items() if "sampling" in key}
    assert found == {
        "general.sampling.temp": 3.0,
        "general.sampling.top_k": 50,
        "general.sampling.min_p": 0.0,
    }
    command = ("run", file, "--prompt", PROMPT, "--max-new", 16)
    drawn = told(*command)["text"]
    assert drawn == told(*command, "--seed", 0)["text"] != told(*command, "--seed", 1)["text"]
    likely = told("run", pair[1], *command[2:])["text"]
    for limit in (("--temp", 0), ("--top-k", 1), ("--top-p", 0), ("--min-p", 1)):
        assert likely == told(*command, *limit)["text"] != drawn, limit


def test_a_stop_text_and_an_interrupt_end_an_answer_in_order(pair: Pair) -> None:
    def complete(settings: GenerationSettings, show: Any = lambda _piece: None) -> Completion:
        with GgufRunner(pair[1], settings, context_tokens=1024, warn=print) as runner:
            done = runner.complete(PROMPT, is_chat=True, show=show)
            # What was left half done would answer the next question.
            again = runner.complete(PROMPT, is_chat=True, show=lambda _piece: None)
            assert again.text.startswith(done.text)
            return done

    whole = complete(GenerationSettings(40, temperature=2.0)).text
    stop = next(letter for letter in whole[4:] if letter.isascii())
    stopped = complete(GenerationSettings(40, temperature=2.0, stop=(stop,)))
    assert stopped.text == whole[: whole.index(stop)] and stopped.new_tokens < 40
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    done = complete(GenerationSettings(40), interrupt)
    assert done.interrupted and done.new_tokens == 3


def test_a_conversation_uses_the_template_in_the_file(
    pair: Pair,
    transformers_text: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    capsys.readouterr()
    assert run_cli("run", pair[1], "--chat", "--max-new", "6", "-q", "--json") == 0
    first, second = (json.loads(line)["text"] for line in capsys.readouterr().out.splitlines())
    assert first == transformers_text("<user>hello<|user|>", 6)
    turns = f"<user>hello<assistant>{first}<user>again<|user|>"
    assert second == transformers_text(turns, 6)


def test_a_file_that_ignores_its_plan_warns(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = exported(pair[0], tmp_path / "stock.gguf", "--stock-arch")
    capsys.readouterr()
    assert run_cli("run", file, "--prompt", "a", "--max-new", "2") == 0
    assert "ignores the plan" in capsys.readouterr().err


def test_the_context_fits_the_memory(pair: Pair) -> None:
    file = open_hybrid(pair[1])
    for asked in (1024, 700, 512):
        room = file.context_bytes(LlamaCppSettings(asked))
        found = fitting_context(file, room)
        assert found >= asked // 256 * 256 and file.context_bytes(LlamaCppSettings(found)) <= room
    assert fitting_context(file, 1 << 40) == 4 * CONTEXT
    with pytest.raises(GgufError, match="too little memory"):
        fitting_context(file, 1000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", ""), "cannot be used"),
        (("--prompt", PROMPT, "--context", "20"), "larger --context"),
        (("--prompt", "a", "--context", "1000000"), "not made for so long"),
        (("--prompt", "a", "--full-layers", "1"), "--full-layers"),
        (("--prompt", "a", "--profile", "x"), "--profile"),
        (("--prompt", "a", "--original"), "--original"),
        (("--prompt", "a", "--device", "cpu"), "--device"),
        (("--prompt", "a", "--dtype", "float32"), "--dtype"),
        (("--prompt", "a", "--trust-remote-code"), "--trust-remote-code"),
        (("--prompt", "a", "--temperature", "nan"), "temperature"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(
    options: tuple[str, ...], words: str, pair: Pair, refused: Refused
) -> None:
    assert words in refused("run", pair[1], *options)


def test_a_folder_takes_no_context(pair: Pair, refused: Refused) -> None:
    assert "goes with a GGUF" in refused("run", pair[0], "--prompt", "a", "--context", "64")


def test_a_file_without_a_template_cannot_chat(
    hybrid: Files, gguf: Files, tmp_path: Path, refused: Refused
) -> None:
    chat = ("--chat", "--prompt", "a")
    assert "no chat template" in refused("run", gguf("mistral"), *chat)
    checkpoint = Path(shutil.copytree(hybrid("mistral"), tmp_path / "changed"))
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    assert "cannot be used" in refused("run", exported(checkpoint, tmp_path / "x.gguf"), *chat)
