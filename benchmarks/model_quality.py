"""What the demonstration model can do: recall with full and sliding layers, and each layer's part.

A second opinion on purpose: nothing here uses `converter`'s own measuring code.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from converter.calibration.data.facts import KINDS
from converter.calibration.data.recall import RecallExample, base_prompt

WINDOW_TOKENS = 16


def causal_attention(  # the signature is transformers' own
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float,
    **ignored: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """Causal attention by plain matrix products, over the module's window when it has one.

    In bfloat16 on a processor this is two to ten times faster than the fused kernel at these
    lengths. Takes (batch, heads, length, head_dim), returns (batch, length, heads, head_dim).
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    key = key.repeat_interleave(groups, 1).reshape(batch * heads, length, width)
    value = value.repeat_interleave(groups, 1).reshape(batch * heads, length, width)
    window = getattr(module, "sliding_window", None)
    hidden = torch.full((length, length), -30_000.0, dtype=query.dtype)
    mask = hidden.triu(1)
    if window is not None:
        mask = mask + hidden.tril(-window)
    scores = torch.baddbmm(
        mask.expand(batch * heads, length, length),
        (query * scaling).reshape(batch * heads, length, width),
        key.transpose(1, 2),
    )
    mixed = torch.softmax(scores, -1) @ value
    return mixed.view(batch, heads, length, width).transpose(1, 2), None


AttentionInterface.register("plain_training", causal_attention)


@dataclass(frozen=True)
class Asked:
    """Examples as tokens.

    Attributes:
        tokens: (examples, longest), zeros after the answer.
        answers: (examples, longest), true on answer tokens.
        kinds: each example's kind.

    """

    tokens: Tensor
    answers: Tensor
    kinds: tuple[str, ...]


def asked(tokenizer: Tokenizer, examples: Sequence[RecallExample]) -> Asked:
    """Tokenize prompts and answers."""
    prompts = [tokenizer.encode(base_prompt(example)).ids for example in examples]
    answers = [tokenizer.encode(" " + example.answer).ids for example in examples]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    marks = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = prompt + answer
        tokens[row, : len(whole)] = torch.tensor(whole)
        marks[row, len(prompt) : len(whole)] = True
    return Asked(tokens, marks, tuple(example.kind for example in examples))


def attending(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Each layer that attends and its attention; recurrent layers are left out."""
    return {
        index: layer.self_attn
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer, "self_attn")
    }


def set_windows(model: PreTrainedModel, windows: Sequence[int | None]) -> None:
    """Give each layer that attends its window, None for full attention."""
    for attention, window in zip(attending(model).values(), windows, strict=True):
        attention.sliding_window = window  # type: ignore[assignment]


@torch.no_grad()
def answer_nll(
    model: PreTrainedModel, data: Asked, windows: Sequence[int | None], batch: int = 64
) -> tuple[Tensor, Tensor]:
    """Measure answers under the given windows of the layers that attend.

    Returns:
        For each example the mean nats per answer token, and whether greedy decoding answers exactly
        (which teacher forcing decides: every answer token the most likely one).

    """
    set_windows(model, windows)
    losses, exact = [], []
    for start in range(0, len(data.kinds), batch):
        tokens = data.tokens[start : start + batch]
        marks = data.answers[start : start + batch, 1:]
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[marks]).float()
        targets = tokens[:, 1:][marks]
        rows = marks.nonzero()[:, 0]
        count = marks.sum(1)
        nll = nn.functional.cross_entropy(logits, targets, reduction="none")
        wrong = (logits.argmax(-1) != targets).float()
        losses.append(torch.zeros(len(tokens)).index_add(0, rows, nll) / count)
        exact.append(torch.zeros(len(tokens)).index_add(0, rows, wrong) == 0)
    set_windows(model, [None] * len(windows))
    return torch.cat(losses), torch.cat(exact)


@dataclass(frozen=True)
class Share:
    """A share of examples with its 95% Wilson interval."""

    right: int
    count: int

    def __str__(self) -> str:
        """Write the share and its interval."""
        p, n, z = self.right / self.count, self.count, 1.96
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return f"{p:.3f} [{middle - half:.3f}, {middle + half:.3f}] (n={n})"


def shares(exact: Tensor, kinds: Sequence[str]) -> dict[str, Share]:
    """Exact answers overall and by kind."""
    found = {"overall": Share(int(exact.sum()), len(kinds))}
    for kind in KINDS:
        mine = torch.tensor([one == kind for one in kinds])
        found[kind] = Share(int(exact[mine].sum()), int(mine.sum()))
    return found


@dataclass(frozen=True)
class LayerScores:
    """Mean changes of answer NLL in nats, one for each that attends, with standard errors."""

    remove_one: tuple[tuple[float, float], ...]
    restore_one: tuple[tuple[float, float], ...]


def layer_scores(model: PreTrainedModel, data: Asked, window: int) -> LayerScores:
    """Score exactly: each removed from the full model, restored to the all-sliding one."""
    layers = range(len(attending(model)))

    def nll(sliding: Collection[int]) -> Tensor:
        return answer_nll(model, data, [window if i in sliding else None for i in layers])[0]

    def summary(difference: Tensor) -> tuple[float, float]:
        error = difference.std() / math.sqrt(len(difference))
        return float(difference.mean()), float(error)

    full, none = nll(()), nll(layers)
    return LayerScores(
        tuple(summary(nll([k]) - full) for k in layers),
        tuple(summary(none - nll([i for i in layers if i != k])) for k in layers),
    )
