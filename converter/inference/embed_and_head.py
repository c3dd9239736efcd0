"""A model without its layers: what comes before them and what comes after."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from converter.inference.attention import Attention, attention_of_type, kinds_of
from converter.inference.example import Example


class _LayersStandIn(nn.Module):
    """Stands where the layers were: notes what they would be given, returns what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, dict[str, Any]]] = []
        self.returned: Any = None

    def forward(self, hidden_states: Any, *_: Any, **others: Any) -> Any:
        self.seen.append((hidden_states, others))
        # Nobody reads the result of the first visit, so one row is enough for what follows.
        return hidden_states[:, :1] if self.returned is None else self.returned


class EmbedAndHead:
    """The embedding, positions, last norm and output head of a loaded model, in its own code.

    The model's layers are taken out and kept by whoever runs them; a stand-in takes their place,
    so that everything around them (scaled embeddings, scaled logits) stays the family's own.

    The loaded model loses its layers.

    Attributes:
        kinds: what each layer is in the model itself.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = _LayersStandIn()
        self._decoder = model.get_decoder()
        # Of a multimodal model, its language model's.
        config = self._decoder.config
        # As often as there are layers: what they are given goes by their kind.
        self.kinds = kinds_of(config)
        self._decoder.layers = nn.ModuleList([self._layers] * len(self.kinds))
        self.config = config
        self.device: torch.device = model.device
        self._attention_name: str = config._attn_implementation

    def attention(self, layer_type: str) -> Attention:
        """The checkpoint's attention in layers of a type."""
        return attention_of_type(self._attention, layer_type)

    @property
    def _attention(self) -> Attention:
        # Of several modeling files in one process the last that was loaded serves them all.
        attention: Attention = AttentionInterface()[self._attention_name]
        return attention

    def rows_from(self, first: int) -> Any:
        """What the checkpoint's attention is told of rows that begin at a position."""
        return sys.modules[self._attention.__module__].Rows(first)

    def inputs(self, example: Example) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """What the first layer gets when the model reads a prompt and its answer.

        (1, tokens, hidden) embeddings, and each layer's further arguments for all tokens.
        """
        ids = [*example.prompt, *example.answer[:-1]]
        self._layers.returned = None
        self._decoder(
            input_ids=torch.tensor([ids], device=self.device),
            use_cache=False,
            prompt_length=len(example.prompt),
        )
        seen, self._layers.seen = self._layers.seen, []
        return seen[0][0], [others for _, others in seen]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head over (batch, rows, hidden) that left the last layer."""
        logits: torch.Tensor = self._above(self._model, hidden).logits
        return logits

    def last_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output head reads: (batch, rows, hidden) that left the last layer, normed."""
        normed: torch.Tensor = self._above(self._decoder, hidden).last_hidden_state
        return normed

    def _above(self, module: Any, hidden: torch.Tensor) -> Any:
        self._layers.returned = hidden
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            return module(input_ids=ids, use_cache=False)
        finally:
            self._layers.returned, self._layers.seen = None, []


def states_above(model: Any, **inputs: Any) -> torch.Tensor:
    """What leaves the last layer of a whole model: (batch, tokens, hidden)."""
    found: list[torch.Tensor] = []
    last = model.get_decoder().layers[-1]
    hook = last.register_forward_hook(lambda _layer, _given, states: found.append(states))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return found[0]


def logits_above(model: Any, states: torch.Tensor) -> torch.Tensor:
    """The output head of a whole model over rows of `states_above`, in the model's own code."""
    decoder, stand_in = model.get_decoder(), _LayersStandIn()
    stand_in.returned = states
    layers, decoder.layers = decoder.layers, nn.ModuleList([stand_in])
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        decoder.layers = layers
    return logits


def answer_nll(logits: torch.Tensor, example: Example) -> torch.Tensor:
    """Mean NLL of the answer tokens, a scalar in nats, from (answer tokens, vocabulary).

    At least in float32, whatever the logits are in.
    """
    answer = torch.tensor(example.answer, device=logits.device)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -exact.log_softmax(dim=-1).gather(1, answer[:, None]).mean()
