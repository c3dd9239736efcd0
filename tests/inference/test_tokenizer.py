"""A chat template is a program of a stranger's: rendered as transformers does, under limits."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from converter.common.errors import ChatTemplateError, SourceError
from converter.inference.tokenizer import chat_text, load_tokenizer
from tests.conftest import make_tokenizer, shared

TURNS = [{"role": "user", "content": "¿Qué?"}, {"role": "assistant", "content": "<b>'x'</b>"}]


def with_template(folder: Path, template: str) -> Any:
    """A tokenizer that gets another template only after it was loaded."""
    make_tokenizer(folder)
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% endfor %}",
        "{% for m in messages %}\n  {{ m | tojson(indent=1) }}\n{% break %}{% endfor %}",
        "{{ eos_token ~ 'x' * 3 }}{% if add_generation_prompt %}<|a|>{% endif %}\n",
    ],
)
def test_a_text_is_what_transformers_makes(template: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, template)
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, TURNS) == expected


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen3"])
def test_real_templates_make_the_same_texts(name: str) -> None:
    tokenizer: Any = load_tokenizer(shared(f"tokenizers/{name}"))
    turns = TURNS[:1]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, turns) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 10**8 }}", "100,000,000 characters"),
        ("{{ 'x' * 10**10 }}", "MemoryError"),
        ("{{ [[0] * 10**6] * 10**8 | length }}", "MemoryError"),
        (
            "{% set n = namespace(x='a') %}"
            "{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "",
        ),
        ("{% if messages | length > 1 %}{{ 'x' * 10**10 }}{% endif %}", "MemoryError"),
        ("{{ 10**(10**9) }}", "longer than any"),
        (
            "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
            "longer than any",
        ),
        ("{{ '\\ud800' }}", "surrogates"),
    ],
)
def test_a_template_that_takes_too_much_is_refused(
    template: str, said: str, tmp_path: Path
) -> None:
    tokenizer = with_template(tmp_path, template)
    started = time.monotonic()
    with pytest.raises(SourceError) as error:
        chat_text(tokenizer, TURNS)
    assert time.monotonic() - started < 60
    assert said in error.value.details["got"]
    assert str(tmp_path) in error.value.details["where"]
    # The next one is rendered all the same.
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert chat_text(tokenizer, TURNS) == "¿Qué?"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "xpected"),
    ],
)
def test_what_a_template_refuses_itself_is_told_apart(
    template: str, said: str, tmp_path: Path
) -> None:
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(ChatTemplateError) as error:
        chat_text(tokenizer, TURNS)
    assert said in error.value.details["got"]


def test_a_long_text_is_no_reason_for_a_warning(tmp_path: Path) -> None:
    """Prompts are held to the model's own context, by messages of ours."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 16}))
    tokenizer, said = load_tokenizer(tmp_path), list[logging.LogRecord]()
    handler, logger = logging.Handler(), logging.getLogger("transformers")
    handler.emit = said.append  # type: ignore[method-assign, assignment]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        assert len(tokenizer.encode("the farmer walked home " * 20)) > 16
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert said == []
