"""A model folder's own tokenizer, without running code from it."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from converter.checkpoint.private import private_tokenizer
from converter.common.errors import ChatTemplateError, SourceError, refusing

_UNUSABLE = "the tokenizer's chat template cannot be used"


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None
    special_tokens_map: dict[str, str]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def get_chat_template(self) -> str:
        """The template of conversations without tools."""


def load_tokenizer(folder: Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """A folder's own tokenizer, without running code from it.

    The source's configuration is given where the folder has a hybrid's.

    Raises:
        SourceError: the folder has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase
    from transformers.tokenization_utils_base import LARGE_INTEGER

    with (
        private_tokenizer(folder, config) as private,
        refusing("the tokenizer cannot be loaded", folder, SourceError, private),
    ):
        # Lengths are checked here by the model's own context; the tokenizer would warn besides.
        loaded: Any = AutoTokenizer.from_pretrained(
            private,
            local_files_only=True,
            trust_remote_code=False,
            model_max_length=LARGE_INTEGER,
        )
        if not isinstance(loaded, PreTrainedTokenizerBase):
            raise TypeError(f"{type(loaded).__name__} is no tokenizer")
        loaded.name_or_path = str(folder)
        tokenizer: Tokenizer = loaded
        made = tokenizer.encode("It was so.", add_special_tokens=False)
    # Without files of its own, transformers makes up a tokenizer that knows no word.
    if not made:
        raise SourceError(
            "the tokenizer cannot be loaded",
            where=folder,
            got="one that makes no tokens of a text",
            next_step="put tokenizer.json beside config.json",
        )
    if tokenizer.chat_template:
        chat_text(tokenizer, [{"role": "user", "content": "It was so."}])
    return tokenizer


def chat_text(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    """A conversation as the text after which the model answers.

    What transformers' `apply_chat_template` gives, by `rendered`.

    Raises:
        ChatTemplateError: the template refuses these messages.
        SourceError: it fails, or takes more than any real one.
    """
    where = getattr(tokenizer, "name_or_path", None)
    with refusing(_UNUSABLE, where, SourceError):
        template, specials = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    return rendered(template, messages, specials, where)


def rendered(
    template: str, messages: Sequence[Mapping[str, str]], specials: Mapping[str, str], where: object
) -> str:
    """A conversation by a chat template, computed under limits of memory and time.

    Args:
        specials: texts of special tokens, as `eos_token`.
        where: the file or folder of the template, for errors.

    Raises:
        ChatTemplateError: the template refuses these messages.
        SourceError: it fails, or takes more than any real one.
    """
    with refusing(_UNUSABLE, where, SourceError):
        asked = {
            "conversations": [list(messages)],
            "chat_template": template,
            "add_generation_prompt": True,
            **specials,
        }
        process = _renderer(os.getpid())
        try:
            answer = _asked(process, asked)
        except (OSError, ValueError):
            _renderer.cache_clear()
            with suppress(OSError):
                process.communicate()
            status = process.returncode
            slow = status == -signal.SIGPROF
            said = "it takes longer than any" if slow else f"its process ended, status {status}"
            raise ValueError(said) from None
    if "refused" in answer:
        raise ChatTemplateError(_UNUSABLE, where=where, got=answer["refused"])
    if "error" in answer:
        raise SourceError(_UNUSABLE, where=where, got=answer["error"])
    return answer["text"]


def _asked(process: subprocess.Popen[str], request: Mapping[str, Any]) -> dict[str, str]:
    given, made = process.stdin, process.stdout
    if given is None or made is None:
        raise BrokenPipeError
    given.write(json.dumps(request) + "\n")
    given.flush()
    answer: dict[str, str] = json.loads(made.readline())
    return answer


@cache
def _renderer(_owner: int) -> subprocess.Popen[str]:
    """The process that renders templates for this one; it ends with its owner."""
    program = str(Path(__file__).with_name("template_process.py"))
    process = subprocess.Popen(
        [sys.executable, "-I", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    # Its pipes are closed in order, and with them it ends.
    atexit.register(process.__exit__, None, None, None)
    return process
