"""A model folder's own tokenizer, without running code from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from converter.checkpoint.private import private_tokenizer
from converter.common.errors import SourceError


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """A conversation as the text the model was trained to read."""


_STUMBLES = (AttributeError, LookupError, TypeError, ValueError)


def load_tokenizer(folder: Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """A folder's own tokenizer, without running code from it.

    The source's configuration is given where the folder has a hybrid's.

    Raises:
        SourceError: the folder has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    private = folder
    try:
        with private_tokenizer(folder, config) as private:
            loaded: Any = AutoTokenizer.from_pretrained(
                private, local_files_only=True, trust_remote_code=False
            )
        if not isinstance(loaded, PreTrainedTokenizerBase):
            raise TypeError(f"{type(loaded).__name__} is no tokenizer")
    except Exception as error:
        # The tokenizers library raises `Exception` itself for files that it cannot make sense of,
        # and transformers stumbles over others in these ways.
        if type(error) is not Exception and not isinstance(error, (OSError, *_STUMBLES)):
            raise
        told = str(error).replace(str(private), str(folder))
        reason = (told.splitlines() or [type(error).__name__])[0]
        raise SourceError("the tokenizer cannot be loaded", where=folder, got=reason) from error
    tokenizer: Tokenizer = loaded
    # Without files of its own, transformers makes up a tokenizer that knows no word.
    if not tokenizer.encode("It was so.", add_special_tokens=False):
        raise SourceError(
            "the tokenizer cannot be loaded",
            where=folder,
            got="one that makes no tokens of a text",
            next_step="put tokenizer.json beside config.json",
        )
    if tokenizer.chat_template:
        try:
            chat_text(tokenizer, [{"role": "user", "content": "It was so."}])
        # It is a program in a sandbox: it may divide by nothing, or ask for too much memory.
        except (TemplateError, *_STUMBLES, ArithmeticError, MemoryError, RecursionError) as error:
            raise SourceError(
                "the tokenizer's chat template cannot be used",
                where=folder,
                got=str(error) or type(error).__name__,
            ) from error
    return tokenizer


def chat_text(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    """A conversation as the text after which the model answers."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
