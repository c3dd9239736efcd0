"""Which examples to take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataSettings:
    """Which examples to take.

    Attributes:
        data: `recall` for the built-in generator, a .txt file for the generator over that text, or
            a .jsonl or .parquet file of rows; or several of them with labels, as `data_sets` reads.
        samples: examples to score, shared out between the sets as the next two are.
        validation: further ones, on which choices are held against each other.
        holdout: still further ones, kept apart to report the quality of the chosen plan.
        length_tokens: the longest prompt; generated prompts have this length.
    """

    data: str
    samples: int
    validation: int
    holdout: int
    length_tokens: int
    min_answer_tokens: int
    max_answer_tokens: int
    seed: int

    @property
    def drawn_by(self) -> dict[str, Any]:
        """All of it, by option, but for the numbers of examples: more begin with the fewer."""
        return {
            "data": self.data,
            "length": self.length_tokens,
            "min-answer": self.min_answer_tokens,
            "max-answer": self.max_answer_tokens,
            "seed": self.seed,
        }
