"""What a model is run on: a prompt, and the answer whose likelihood is measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A tokenized prompt and the answer whose likelihood is measured.

    Attributes:
        prompt: token ids.
        answer: token ids that follow the prompt.
        kind: what the example exercises: the label of its data set, or how it was made.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str

    @property
    def digest(self) -> str:
        """A hash over its token ids."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()
