"""The layers of a model, all in memory or read from disk one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from converter.checkpoint.format import config_layer_types
from converter.common.errors import SourceError
from converter.inference.waiting import Arriving, DeviceCopies
from converter.model.mask import SLIDING
from converter.model.source import Source
from converter.model.tensors import read_layer, tell_all_layers


class ResidentLayers:
    """Layers that stay in memory."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = tuple(modules)

    def visit(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The layers of an order, each with its index."""
        return ((index, self.modules[index]) for index in order)


class StreamedLayers:
    """Layers read from the source's safetensors when their turn comes.

    While one layer is at work the next is read, so two are in memory at a time. The loaded model
    is what stands around the layers, with one layer to take the class from.
    """

    def __init__(self, source: Source, model: Any, device: str, dtype: torch.dtype) -> None:
        self._source = source
        self._copies = DeviceCopies(torch.device(device))
        self._dtype = dtype
        decoder = model.get_decoder()
        self._class = type(decoder.layers[0])
        self.config: Any = decoder.config
        sliding = (SLIDING,) * source.shape.layers
        tell_all_layers(source, decoder, config_layer_types(source.shape, sliding))

    def visit(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The layers of an order, each with its index; a layer is gone when the next one comes."""
        with ThreadPoolExecutor(1, "layer-reader") as reader:
            coming = [reader.submit(self._send, index) for index in order[:1]]
            for place, index in enumerate(order):
                arriving = coming.pop().result()
                coming += [reader.submit(self._send, i) for i in order[place + 1 : place + 2]]
                yield index, self._build(index, self._copies.receive(arriving))
                del arriving
                # The work may only have been asked for, and the layer must be gone after it.
                self._copies.finish_work()

    def _send(self, index: int) -> Arriving:
        return self._copies.send(self._read(index))

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        return read_layer(self._source, index, "cpu", self._dtype)

    def _build(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Any:
        with torch.device("meta"):
            layer = self._class(self.config, index)
        try:
            layer.load_state_dict(dict(tensors), assign=True)
        except RuntimeError as error:
            raise SourceError(
                f"the tensors of layer {index} do not fit the model's code",
                where=self._source.folder,
                got=str(error).splitlines()[-1].strip(),
            ) from error
        return layer.eval().requires_grad_(False)


Layers = ResidentLayers | StreamedLayers
