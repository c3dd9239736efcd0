"""What the tests hold the package against: masks written down pair by pair, attention by softmax.

Nothing of `converter` or of the modeling file is used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FULL, SLIDING = "full_attention", "sliding_attention"
# Of a layer of which only the KV heads that are named after it attend fully.
MIXED = "mixed_attention:"


@dataclass(frozen=True)
class Rule:
    """What a row sees: the definition, once more."""

    # None in a full layer.
    window: int | None
    sinks: int = 0
    # Rows from here on see everything; None when no row does.
    generated_from: int | None = None

    def sees(self, q: int, p: int, start: int) -> bool:
        """Whether the token at q attends to position p; their sequence begins at start."""
        if p > q or p < start:
            return False
        if self.window is None:
            return True
        if self.generated_from is not None and q >= self.generated_from:
            return True
        return q - p <= self.window - 1 or p - start <= self.sinks - 1

    def matrix(
        self, rows: range, keys: range, starts: Sequence[int], hidden: frozenset[int] = frozenset()
    ) -> torch.Tensor:
        """(rows, keys) bool, decided one pair at a time, from positions.

        The sequence of each position begins at its start; nobody sees the hidden ones, of padding.
        """
        seen = [
            starts[p] == starts[q] and self.sees(q, p, starts[q]) and p not in hidden
            for q in rows
            for p in keys
        ]
        return torch.tensor(seen, dtype=torch.bool).reshape(len(rows), len(keys))


def kinds_of_heads(kind: str, kv_heads: int) -> list[str]:
    """What each KV head of a layer of a kind does."""
    if not kind.startswith(MIXED):
        return [kind] * kv_heads
    full = {int(head) for head in kind.removeprefix(MIXED).split(",")}
    return [FULL if head in full else SLIDING for head in range(kv_heads)]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention in float64, head by head.

    Queries are (batch, heads, rows, head_dim), keys and values (batch, kv_heads, keys, head_dim),
    what is seen (batch, rows, keys). Gives (batch, rows, heads, head_dim), NaN in a row that sees
    nothing.
    """
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // groups].double().transpose(1, 2) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        heads.append(weights @ value[:, head // groups].double())
    return torch.stack(heads, dim=2)


@lru_cache(maxsize=256)
def additive(rule: Rule, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """(1, 1, rows, rows): 0 where a row sees a key, the lowest number where it does not."""
    seen = rule.matrix(range(rows), range(rows), [0] * rows)
    lowest = torch.finfo(dtype).min
    return torch.zeros(1, 1, rows, rows, dtype=dtype).masked_fill(~seen, lowest)


class EagerModel:
    """A source in transformers' own eager code; each layer is handed a mask that was written down.

    Another attention function than the eager one may be named.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float64, attention: str = "eager"
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
        config = AutoConfig.from_pretrained(folder)
        if any(hasattr(config, name) for name in ("num_experts", "n_routed_experts")):
            # The grouped kernel of experts has no float64.
            options["experts_implementation"] = "eager"
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
        self.model: Any = model.eval()

    @torch.inference_mode()
    def logits(
        self,
        ids: Sequence[int],
        layer_types: Sequence[str],
        window: int,
        sinks: int = 0,
        generated_from: int | None = None,
    ) -> torch.Tensor:
        """Logits (tokens, vocabulary) of one unpadded text, computed whole."""
        rules = {FULL: Rule(None), SLIDING: Rule(window, sinks, generated_from)}
        config, masks = self.model.config, dict[str, torch.Tensor]()
        for kind in set(layer_types):
            heads = kinds_of_heads(kind, config.num_key_value_heads)
            each = [additive(rules[head], len(ids), self.model.dtype) for head in heads]
            groups = config.num_attention_heads // len(heads)
            masks[kind] = torch.cat(each, dim=1).repeat_interleave(groups, dim=1)
        with ExitStack() as hooks:
            for layer, kind in zip(self.model.model.layers, layer_types, strict=True):
                hooks.callback(hand_mask(layer, masks[kind]).remove)
            logits: torch.Tensor = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits

    def greedy(
        self, prompt: Sequence[int], new_tokens: int, layer_types: Sequence[str], **mask: Any
    ) -> list[int]:
        """Greedy continuation, every token from a pass over the whole text."""
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(self.logits(ids, layer_types, **mask)[-1].argmax()))
        return ids[len(prompt) :]

    @torch.inference_mode()
    def attentions(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """(heads, rows, keys) of every layer, all of them full."""
        output = self.model(torch.tensor([list(ids)]), use_cache=False, output_attentions=True)
        return [weights[0] for weights in output.attentions]


def hand_mask(layer: Any, mask: torch.Tensor) -> Any:
    """Hand a layer this mask instead of what the model makes; the hook."""
    return layer.register_forward_pre_hook(
        lambda _module, given, options: (given, options | {"attention_mask": mask}),
        with_kwargs=True,
    )
