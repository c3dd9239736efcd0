"""The independent reference: the unmodified source under a brute-force mask for each layer.

The attention is a softmax in float64 over all keys, without cache, padding or chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint.format import config_layer_types
from converter.checkpoint.private import private_source
from converter.checkpoint.verify.place import Place
from converter.common.errors import SourceError, refusing
from converter.common.files import read_json_object, write_json
from converter.model.mask import FULL, OWN_SLIDING, Mask, full_kv_heads
from converter.model.source import Source
from converter.model.tensors import (
    build_model,
    names_around_layers,
    read_layer,
    tell_all_layers,
    with_first_layers,
)
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

    Args:
        source, place, plan: what computes what, and where.
        layers: of the model to have; None for all.
    """

    def __init__(self, source: Source, place: Place, plan: Plan, layers: int | None = None) -> None:
        import torch

        from converter.common.progress import quiet_libraries

        quiet_libraries()
        self._attention = _PlannedAttention(plan)
        self._source, self._place, self._dtype = source, place, getattr(torch, place.dtype)
        with (
            private_source(source) as folder,
            refusing("the model cannot be loaded", source.folder, SourceError, folder),
        ):
            if layers is None and place.in_turn:
                self._model = self._load(folder, source.shape.first_of_every_kind)
                self._take_layers_in_turn()
            else:
                self._model = self._load(folder, layers or source.shape.layers)

    def original(self, ids: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Logits (rows, vocabulary) of the unmodified source."""
        return self._logits("sdpa", ids, rows)

    def planned(self, ids: Sequence[int], rows: Sequence[int], prompt: int) -> torch.Tensor:
        """Logits (rows, vocabulary) of the source under the plan; rows from `prompt` on decode."""
        from transformers import AttentionInterface

        AttentionInterface.register(_NAME, self._attention)
        self._attention.prompt = prompt
        return self._logits(_NAME, ids, rows)

    def _load(self, folder: Path, layers: int) -> Any:
        """The model on its device, with the first so many of its layers."""
        import torch

        path, names = folder / "config.json", None
        if layers < self._source.shape.layers:
            config = read_json_object(path, SourceError)
            write_json(path, with_first_layers(self._source, config, layers))
            names = names_around_layers(self._source, layers)
        model = build_model(
            self._source,
            folder,
            getattr(torch, self._place.load_dtype),
            names,
            trust_remote_code=False,
            attn_implementation="sdpa",
            **self._source.family.load_exactly,
        )
        return model.to(device=self._place.device, dtype=self._dtype).eval()

    def _take_layers_in_turn(self) -> None:
        """Put layers without weights in the place of the only one; they are read at their turn."""
        import torch

        decoder, shape = self._model.get_decoder(), self._source.shape
        config, count = decoder.config, shape.layers
        tell_all_layers(self._source, decoder, config_layer_types(shape, (FULL,) * count))
        its_class = type(decoder.layers[0])
        with torch.device("meta"):
            decoder.layers = torch.nn.ModuleList(its_class(config, i) for i in range(count)).eval()

        def bring(layer: Any, _: object) -> None:
            index = list(decoder.layers).index(layer)
            state = read_layer(self._source, index, self._place.device, self._dtype)
            layer.load_state_dict(state, assign=True)

        def drop(layer: Any, *_: object) -> None:
            layer.to("meta")

        for layer in decoder.layers:
            layer.register_forward_pre_hook(bring)
            layer.register_forward_hook(drop)

    def _logits(self, attention: str, ids: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        import torch

        self._model.set_attn_implementation(attention)
        with torch.inference_mode(), _exact_products():
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([list(ids)], device=self._place.device),
                logits_to_keep=torch.tensor(list(rows), device=self._place.device),
                use_cache=False,
            ).logits[0]
        return logits.cpu()


class _PlannedAttention:
    """Brute force under a plan, as transformers calls attention; it outlives the model it serves.

    Attributes:
        prompt: tokens of the prompt.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self.prompt = plan, 0

    def _seen(
        self, module: Any, kv_heads: int, rows: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """Which keys the rows of a layer see, for each KV head: (kv_heads, rows, keys) bool.

        In a layer that no plan changes, by its own window.
        """
        import torch

        kind = self._plan.layer_types[module.layer_idx]
        own = kind == OWN_SLIDING
        mask = Mask(module.config.sliding_window) if own else self._plan.mask
        slides, every = visible(mask, rows, keys, self.prompt), keys <= rows
        full = full_kv_heads(kind, kv_heads)
        return torch.stack([every if head in full else slides for head in range(kv_heads)])

    def __call__(
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

        kv_heads = key.shape[1]
        groups = query.shape[1] // kv_heads
        keys = key.double().repeat_interleave(groups, dim=1)
        values = value.double().repeat_interleave(groups, dim=1)
        position = torch.arange(query.shape[2], device=query.device)
        outputs = []
        for rows in torch.split(position, _ROW_BLOCK):
            row, every = rows[:, None], position[None, :]
            seen = self._seen(module, kv_heads, row, every).repeat_interleave(groups, dim=0)
            scores = query[:, :, rows].double() @ keys.transpose(2, 3) * scaling
            weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
            outputs.append((weights @ values).to(query.dtype))
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


@contextmanager
def _exact_products() -> Iterator[None]:
    """Matrix products of float32 in float32: not in TF32, which rounds to ten bits."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
