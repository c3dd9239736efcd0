"""The unmodified source in transformers' own eager code: nothing of `converter` is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.brute_force import FULL, SLIDING, Rule


@cache
def _additive(rule: Rule, rows: int) -> torch.Tensor:
    """(1, 1, rows, rows): 0 where a row sees a key, the lowest number where it does not."""
    seen = rule.matrix(range(rows), range(rows), [0] * rows)
    lowest = torch.finfo(torch.float64).min
    return torch.zeros(1, 1, rows, rows, dtype=torch.float64).masked_fill(~seen, lowest)


class WholeModel:
    """A source in float64, of any family; each layer is handed a mask that was written down."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        # The grouped kernel of experts has no float64.
        experts = {"experts_implementation": "eager"} if hasattr(config, "num_experts") else {}
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            local_files_only=True,
            **experts,
        ).eval()

    @torch.inference_mode()
    def run(
        self,
        ids: Sequence[int],
        kinds: Sequence[str],
        window: int,
        sinks: int,
        generated_from: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows of one text: what the last layer gives (rows, hidden), and its logits."""
        rules = {FULL: Rule(None), SLIDING: Rule(window, sinks, generated_from)}
        tops = []
        norm = self.model.model.norm
        with ExitStack() as stack:
            for layer, kind in zip(self.model.model.layers, kinds, strict=True):
                stack.enter_context(_masked(layer, _additive(rules[kind], len(ids))))
            handle = norm.register_forward_pre_hook(lambda _module, given: tops.append(given[0][0]))
            stack.callback(handle.remove)
            logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return tops[0], logits

    @torch.inference_mode()
    def attentions(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """(heads, rows, keys) of every layer, all of them full."""
        output = self.model(torch.tensor([list(ids)]), use_cache=False, output_attentions=True)
        return [weights[0] for weights in output.attentions]


@contextmanager
def _masked(layer: Any, mask: torch.Tensor) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(
        lambda _module, given, options: (given, options | {"attention_mask": mask}),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()
