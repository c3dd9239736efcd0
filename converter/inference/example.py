"""What a model is run on: a prompt, and the answer whose likelihood is measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the answer that follows it.

    Its kind says what it exercises: the label of its data set, or how it was made.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str

    @property
    def digest(self) -> str:
        """A hash over its token ids."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()
