"""What a sliding layer lets each token see. Scores are measured under it and plans record it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converter.common.errors import PlanError

FULL = "full_attention"
SLIDING = "sliding_attention"
# Layers that no plan changes: recurrent ones, and those that slide by a window of the model's own.
LINEAR = "linear_attention"
OWN_SLIDING = "own_sliding_attention"
# A layer of which some KV heads, with the query heads that share them, attend fully and the others
# slide: `mixed_attention:0,2` names those that attend fully.
MIXED = "mixed_attention"


def kind_of_heads(full: Iterable[int], kv_heads: int) -> str:
    """The kind of a layer of which these KV heads attend fully."""
    kept = sorted(set(full))
    if not kept:
        return SLIDING
    return FULL if len(kept) == kv_heads else f"{MIXED}:{','.join(map(str, kept))}"


def full_kv_heads(kind: str, kv_heads: int) -> tuple[int, ...]:
    """The KV heads that attend fully in a layer of a kind; none where no plan decides it.

    Raises:
        ValueError: the kind is no mixture of so many KV heads, spelled as `kind_of_heads` does.
    """
    word, _, heads = kind.partition(":")
    if word != MIXED:
        return tuple(range(kv_heads)) if kind == FULL else ()
    found = tuple(int(head) for head in heads.split(","))
    if not set(found) <= set(range(kv_heads)) or kind_of_heads(found, kv_heads) != kind:
        raise ValueError(f"{kind!r} is no mixture of {kv_heads} KV heads")
    return found


def is_mixed(kind: str) -> bool:
    """Whether some KV heads of a layer of this kind attend fully and the others slide."""
    return kind.startswith(f"{MIXED}:")


def has_mixed(layer_types: Iterable[str]) -> bool:
    """Whether KV heads of one of these layers attend differently."""
    return any(is_mixed(kind) for kind in layer_types)


@dataclass(frozen=True)
class Mask:
    """The attention mask of sliding layers.

    Attributes:
        window_tokens: W, tokens a sliding layer attends to, the current one included.
        sink_tokens: k, the first k positions, which sliding layers always keep.
        full_attention_decode: prompt rows slide, generated rows attend to everything.
    """

    window_tokens: int
    sink_tokens: int = 0
    full_attention_decode: bool = False

    def __post_init__(self) -> None:
        if self.window_tokens < 1:
            raise PlanError(
                "the window is too small",
                where="window_tokens (--window)",
                expected="at least 1 token: the current one",
                got=self.window_tokens,
            )
        if self.sink_tokens < 0:
            raise PlanError(
                "the number of sink tokens is negative",
                where="sink_tokens (--sinks)",
                expected="0 or more",
                got=self.sink_tokens,
            )

    @property
    def is_plain_window(self) -> bool:
        """Whether a bare window says it all, as native sliding-window code computes it.

        A window of one token is left out: transformers' own sliding cache never evicts then
        (`cache_utils.DynamicSlidingWindowLayer` keeps `[-W + 1:]`, which is everything).
        """
        return self.is_bare and self.window_tokens > 1

    @property
    def is_bare(self) -> bool:
        """Whether it is a window and nothing else, of whatever size."""
        return self.sink_tokens == 0 and not self.full_attention_decode

    def check_fits(self, context_tokens: int) -> None:
        """Refuse a mask that never hides anything within the model's context.

        Raises:
            PlanError: the window and the sinks together cover the whole context.
        """
        if self.window_tokens + self.sink_tokens >= context_tokens:
            raise PlanError(
                "the window is as long as the model's context, so sliding would change nothing",
                where="window_tokens (--window)",
                expected=f"window + sinks below {context_tokens} tokens",
                got=self.window_tokens + self.sink_tokens,
                next_step="choose a smaller --window",
            )

    def to_json(self) -> dict[str, Any]:
        """The mask as it stands in plans, scores and checkpoints."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, where: object) -> Mask:
        """Read what `to_json` wrote.

        Raises:
            PlanError: the object lacks a field or has one of another type.
        """
        kinds = {"window_tokens": int, "sink_tokens": int, "full_attention_decode": bool}
        if not isinstance(value, Mapping) or set(value) != set(kinds):
            raise PlanError(
                "this is not a mask", where=where, expected=", ".join(kinds), got=repr(value)
            )
        for name, kind in kinds.items():
            if type(value[name]) is not kind:
                raise PlanError(
                    f"the mask's {name} has the wrong type",
                    where=where,
                    expected=kind.__name__,
                    got=repr(value[name]),
                )
        return cls(**value)

    def __str__(self) -> str:
        parts = [f"window {self.window_tokens}"]
        if self.sink_tokens:
            parts.append(f"{self.sink_tokens} sinks")
        if self.full_attention_decode:
            parts.append("full attention in decode")
        return ", ".join(parts)
