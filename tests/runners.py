"""Runners and calibrations of the test models, and the losses that they are held against."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from converter.calibration.calibrate import CalibrationTask
from converter.calibration.data.examples import Examples
from converter.calibration.distributed import ALONE, Processes
from converter.calibration.run import CalibrationRun
from converter.calibration.selectors import selectors_of
from converter.common.progress import Progress
from converter.inference.embed_and_head import EmbedAndHead
from converter.inference.example import Example
from converter.inference.layers import ResidentLayers, StreamedLayers
from converter.inference.load import Placement, load_model
from converter.inference.positions import NO_ATTENTION, LayerTypes
from converter.inference.runner import ModelRunner
from converter.inference.waiting import ActivationOffload
from converter.model.mask import FULL, SLIDING, Mask
from converter.model.source import open_source
from tests.conftest import LAYERS, SIZES

EXACT = Placement("cpu", "float64")
WINDOW, SINKS = 16, 3
MASKS = {
    "plain": Mask(WINDOW),
    "sinks": Mask(WINDOW, SINKS),
    "full decode": Mask(WINDOW, 0, True),
    "sinks and full decode": Mask(WINDOW, SINKS, True),
    "one token": Mask(1),
    "one token and a sink": Mask(1, 1),
    "longer than the prompt": Mask(200, 2),
}


class Exactly(TorchFunctionMode):
    """Lets nothing fall from float64 to float32, as transformers' norms and routers do.

    Two orders of the same sums would differ by 1e-7 then, which would hide a wrong row.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = dict(options or {})
        single = torch.float32
        if arguments and getattr(arguments[0], "dtype", None) is torch.float64:
            if function is torch.Tensor.float:
                return arguments[0]
            if function in (torch.Tensor.to, torch.Tensor.type):
                if single in arguments[1:] or options.get("dtype") is single:
                    return arguments[0]
            elif options.get("dtype") is single:
                options["dtype"] = torch.float64
        return function(*arguments, **options)


def ignore(_: float) -> None:
    pass


def example_of(prompt: int, answer: int, seed: int = 0) -> Example:
    generator = random.Random(f"{prompt} {answer} {seed}")  # noqa: S311 - reproducible
    tokens = [generator.randrange(SIZES["vocab_size"]) for _ in range(prompt + answer)]
    return Example(tuple(tokens[:prompt]), tuple(tokens[prompt:]), "random")


def random_rows(folder: Path, count: int, characters: int = 60, seed: int = 4) -> Path:
    """A file of rows of random letters, each prompt one longer than the one before."""
    generator = random.Random(seed)  # noqa: S311 - reproducible
    texts = ("".join(generator.choices("abcdefg ", k=characters + row)) for row in range(count))
    rows = [{"prompt": f"{text}.", "answer": f"y{row}"} for row, text in enumerate(texts)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# The first two differ in whether generated rows are read at all.
EXAMPLES = (example_of(70, 1), example_of(61, 5), example_of(150, 3))


def one_in_each(one: str, others: str) -> list[LayerTypes]:
    """Every plan in which one layer is of another kind."""
    return [tuple(one if i == layer else others for i in range(LAYERS)) for layer in range(LAYERS)]


def switching() -> list[LayerTypes]:
    """Both uniform plans, and every plan one switch away from them."""
    uniform = [(FULL,) * LAYERS, (SLIDING,) * LAYERS]
    return uniform + one_in_each(FULL, SLIDING) + one_in_each(SLIDING, FULL)


def leaving_out() -> list[LayerTypes]:
    """The full plan, those that miss one layer's attention, and the one that misses all."""
    missing = one_in_each(NO_ATTENTION, FULL)
    return [(FULL,) * LAYERS, *missing, (NO_ATTENTION,) * LAYERS]


class Plain:
    """The loaded model, whole, every pass over every row and one plan at a time."""

    def __init__(self, folder: Path, mask: Mask) -> None:
        self.model = load_model(open_source(str(folder)), mask, EXACT)

    @torch.inference_mode()
    def logits(self, example: Example, kinds: LayerTypes) -> torch.Tensor:
        """(answer tokens, vocabulary) that predict the answer."""
        self.model.set_full_attention_layers([i for i, kind in enumerate(kinds) if kind == FULL])
        every = zip(self.model.get_decoder().layers, kinds, strict=True)
        absent = [layer.self_attn.o_proj for layer, kind in every if kind == NO_ATTENTION]
        before = [module.weight.clone() for module in absent]
        ids = [*example.prompt, *example.answer[:-1]]
        try:
            for module in absent:
                module.weight.zero_()
            logits: torch.Tensor = self.model(
                input_ids=torch.tensor([ids]),
                use_cache=False,
                prompt_length=len(example.prompt),
                logits_to_keep=torch.arange(len(example.prompt) - 1, len(ids)),
            ).logits[0]
        finally:
            for module, weight in zip(absent, before, strict=True):
                module.weight.copy_(weight)
        return logits

    def nll(self, example: Example, kinds: LayerTypes) -> float:
        """Mean loss of the answer tokens."""
        return loss(self.logits(example, kinds), example)


def loss(logits: torch.Tensor, example: Example) -> float:
    """Mean NLL of an answer from the logits that predict it, by the definition."""
    rows = logits.double()
    return sum(
        float(rows[i].logsumexp(0) - rows[i, token]) for i, token in enumerate(example.answer)
    ) / len(example.answer)


def resident(
    folder: Path, mask: Mask, placement: Placement = EXACT, batch_rows: int = 4096
) -> ModelRunner:
    model = load_model(open_source(str(folder)), mask, placement)
    layers = ResidentLayers(model.get_decoder().layers)
    return ModelRunner(EmbedAndHead(model), layers, mask, batch_rows)


def streamed(
    folder: Path,
    mask: Mask,
    placement: Placement = EXACT,
    offload: Path | None = None,
    plans_together: int | None = None,
) -> ModelRunner:
    """A runner that reads its layers from disk; with a folder, its hidden states wait there."""
    source = open_source(str(folder))
    model = load_model(source, mask, placement, whole=False)
    layers = StreamedLayers(source, model, placement.device, getattr(torch, placement.dtype))
    waiting = None if offload is None else ActivationOffload(offload, model.device)
    ends = EmbedAndHead(model)
    return ModelRunner(ends, layers, mask, 4096, waiting, plans_together=plans_together)


def nlls(
    runner: ModelRunner, examples: Sequence[Example], plans: Sequence[LayerTypes]
) -> list[list[float]]:
    return [[answer.nll for answer in row] for row in runner.answers(examples, plans, ignore)]


@dataclass
class Counter:
    """A progress bar that keeps what it is told."""

    done: float = 0.0
    expected: float = 0.0

    def advance(self, amount: float) -> None:
        """As `Bar.advance`."""
        self.done += amount

    def expect(self, amount: float) -> None:
        """As `Bar.expect`."""
        self.expected = self.done + amount


@contextmanager
def silent(_title: str, layer_forwards: float) -> Iterator[Counter]:
    yield Counter(expected=layer_forwards)


def watched() -> tuple[list[Counter], Progress]:
    """Every bar that is shown from now on, and what shows them."""
    bars: list[Counter] = []

    @contextmanager
    def progress(_title: str, layer_forwards: float) -> Iterator[Counter]:
        bars.append(Counter(expected=layer_forwards))
        yield bars[-1]

    return bars, progress


def scoring(
    methods: str, keep: int = 1, *, race: bool = False, by_kind: bool = False
) -> CalibrationTask:
    """What a calibration by one method, or several with commas, is to find out."""
    return CalibrationTask(selectors_of(methods), keep, race, by_kind)


def run(
    folder: Path,
    examples: Sequence[Example],
    mask: Mask,
    work: Path,
    *,
    placement: Placement = EXACT,
    near: Mapping[int, Example] | None = None,
    processes: Processes = ALONE,
    **more: Any,
) -> CalibrationRun:
    options: dict[str, Any] = {"memory_bytes": None, "fresh": False, "say": lambda _text: None}
    return CalibrationRun(
        source=open_source(str(folder)),
        examples=Examples(tuple(examples), (), ()),
        mask=mask,
        placement=placement,
        work=work,
        processes=processes,
        near_examples=lambda: near or {},
        **(options | more),
    )
