"""The independent reference: the unmodified source under a brute-force mask for each layer.

The attention is a softmax in float64 over all keys, without cache, padding or chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from converter.checkpoint.private import private_source
from converter.common.errors import SourceError, refusing
from converter.model.mask import FULL, Mask
from converter.model.source import Source
from converter.model.tensors import build_model
from converter.plan.plan import Plan

if TYPE_CHECKING:
    import torch

_NAME = "hybridize_reference"
# Rows whose scores are in memory at once.
_ROW_BLOCK = 256


def visible(mask: Mask, rows: torch.Tensor, keys: torch.Tensor, prompt: int) -> torch.Tensor:
    """Which keys a sliding layer lets which rows see, straight from the definition.

    Args:
        mask: the mask.
        rows: (r, 1) positions of the queries.
        keys: (1, k) positions of the keys.
        prompt: tokens of the prompt; later rows are generated.

    Returns:
        (r, k) bool.
    """
    in_window = rows - keys < mask.window_tokens
    is_sink = keys < mask.sink_tokens
    sees_all = (rows >= prompt) if mask.full_attention_decode else (rows < 0)
    return (keys <= rows) & (in_window | is_sink | sees_all)


class Reference:
    """The source, able to compute itself and a plan of itself.

    It is loaded with transformers' own class for it, never with remote code.
    """

    def __init__(self, source: Source, dtype: str, plan: Plan) -> None:
        import torch
        from transformers import AttentionInterface

        from converter.common.progress import quiet_libraries

        quiet_libraries()
        AttentionInterface.register(_NAME, self._attention)
        self._plan, self._prompt = plan, 0
        with (
            private_source(source) as folder,
            refusing("the model cannot be loaded", source.folder, SourceError, folder),
        ):
            self._model = build_model(
                source,
                folder,
                getattr(torch, dtype),
                trust_remote_code=False,
                attn_implementation="sdpa",
                **source.family.load_exactly,
            ).eval()

    def original(self, ids: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Logits (rows, vocabulary) of the unmodified source."""
        return self._logits("sdpa", ids, rows)

    def planned(self, ids: Sequence[int], rows: Sequence[int], prompt: int) -> torch.Tensor:
        """Logits (rows, vocabulary) of the source under the plan; rows from `prompt` on decode."""
        self._prompt = prompt
        return self._logits(_NAME, ids, rows)

    def _logits(self, attention: str, ids: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        import torch

        self._model.set_attn_implementation(attention)
        with torch.inference_mode():
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([list(ids)]),
                logits_to_keep=torch.tensor(list(rows)),
                use_cache=False,
            ).logits[0]
        return logits

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _attention_mask: object,
        scaling: float,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        import torch

        groups = query.shape[1] // key.shape[1]
        keys = key.double().repeat_interleave(groups, dim=1)
        values = value.double().repeat_interleave(groups, dim=1)
        position = torch.arange(query.shape[2])
        outputs = []
        for rows in torch.split(position, _ROW_BLOCK):
            row, every = rows[:, None], position[None, :]
            full = self._plan.layer_types[module.layer_idx] == FULL
            seen = every <= row if full else visible(self._plan.mask, row, every, self._prompt)
            scores = query[:, :, rows].double() @ keys.transpose(2, 3) * scaling
            weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
            outputs.append((weights @ values).to(query.dtype))
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None
