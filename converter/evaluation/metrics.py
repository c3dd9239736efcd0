"""Measuring, journaled after every batch: a killed evaluation goes on and gives the same result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.calibration.cache import open_log
from converter.common.errors import DataError
from converter.common.files import clear_files
from converter.common.progress import Progress
from converter.evaluation.models import VariantModels
from converter.evaluation.results import Answers, Language, Speed
from converter.evaluation.tasks.item import Item
from converter.evaluation.tasks.scoring import RULES, cleaned
from converter.evaluation.variants import Variant
from converter.inference.load import Placement
from converter.model.mask import Mask
from converter.model.source import Source

if TYPE_CHECKING:
    import torch

_PARTS = ("tasks", "language", "speed", "harness")
_DECODED_TOKENS = 16


@dataclass(frozen=True)
class Bench:
    """What measurements run on; equal benches give equal results.

    Attributes:
        source: the model.
        mask: what sliding layers see; None for a plain model.
        variants: what to compare, the original first.
        engine: loads the models when the first forward pass needs them.
        placement: device and dtype.
        batch: items generated at once.
        work: folder for what must survive a kill.
        fresh: forget what an earlier run left there.
        progress: shows how far a loop is.
    """

    source: Source
    mask: Mask | None
    variants: tuple[Variant, ...]
    engine: Callable[[], VariantModels]
    placement: Placement
    batch: int
    work: Path
    fresh: bool
    progress: Progress

    def fingerprint(self, what: object) -> dict[str, Any]:
        """Everything that results depend on, by name."""
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        return {
            "source": self.source.fingerprint,
            "mask": None if self.mask is None else self.mask.to_json(),
            "plans": [variant.key for variant in self.variants],
            "questions": digest,
            "batch": self.batch,
            "dtype": self.placement.dtype,
            "device": self.placement.device.split(":")[0],
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    @property
    def different(self) -> dict[str, Variant]:
        """One variant for everything that is computed, by key: names may share a computation."""
        return {variant.key: variant for variant in reversed(self.variants)}

    def resumable(
        self,
        part: str,
        fingerprint: Mapping[str, Any],
        pieces: Sequence[Any],
        measure: Callable[[Any], dict[str, Any]],
    ) -> list[Mapping[str, Any]]:
        """Measure every piece that no earlier run finished; all records in order."""
        path = self.work / f"{part}.jsonl"
        with open_log(path, fingerprint, fresh=self.fresh) as log:
            records = list(log.records)[: len(pieces)]
            remaining = pieces[len(records) :]
            if remaining:
                with self.progress(part, len(remaining)) as bar:
                    for piece in remaining:
                        record = measure(piece)
                        log.append(record)
                        records.append(record)
                        bar.advance(1)
        return records


def clear_work(folder: Path) -> None:
    """Remove what finished work kept in its folder, and the folder when nothing else is in it."""
    clear_files(folder, [f"{part}.jsonl" for part in _PARTS])


def answer(bench: Bench, items: Sequence[Item]) -> dict[str, Answers]:
    """Every variant's answers to every item, by variant name; empty without items.

    Raises:
        ScoresError: the work folder holds results of another evaluation.
        DataError: the original never answers anything, or a loss is not a finite number.
    """
    if not items:
        return {}
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(items)), key=lambda i: (len(items[i].prompt), i))
    batches = [order[i : i + bench.batch] for i in range(0, len(order), bench.batch)]

    def measure(batch: list[int]) -> dict[str, Any]:
        return _answer_batch(bench, [items[i] for i in batch])

    fingerprint = bench.fingerprint([astuple(item) for item in items])
    records = bench.resumable("tasks", fingerprint, batches, measure)
    by_key: dict[str, dict[str, list[Any]]] = {}
    places = {index: place for place, index in enumerate(i for batch in batches for i in batch)}
    for key in bench.different:
        columns: dict[str, list[Any]] = {}
        for record in records:
            for name, values in record[key].items():
                columns.setdefault(name, []).extend(values)
        by_key[key] = {
            name: [values[places[i]] for i in range(len(items))] for name, values in columns.items()
        }
    _check_answered(by_key[bench.variants[0].key]["texts"])
    return {
        variant.name: Answers(**{n: tuple(v) for n, v in by_key[variant.key].items()})
        for variant in bench.variants
    }


def _check_answered(texts: Sequence[str]) -> None:
    """Refuse to report on an original that says nothing: no plan could lose anything."""
    if not any(text.strip() for text in texts):
        raise DataError(
            "the model answers nothing: every text it generated is empty",
            got=f"{len(texts)} answers without a word",
            next_step="check its generation config (the end-of-text token) and its chat template",
        )


def _answer_batch(bench: Bench, items: list[Item]) -> dict[str, Any]:
    """One batch under every variant, as columns by variant key."""
    engine = bench.engine()
    original = bench.variants[0]
    expected = [_answer_rows(engine, original, item) for item in items]
    record: dict[str, Any] = {}
    for key, variant in bench.different.items():
        columns: dict[str, list[Any]] = {name: [] for name in Answers.__annotations__}
        generated = iter(_generated(engine, variant, items))
        for item, reference in zip(items, expected, strict=True):
            if item.choices:
                chosen = _choose(engine, variant, item)
                columns["texts"].append(engine.tokenizer.decode(_choice_text(item, chosen)))
                columns["scores"].append(float(chosen == item.right_choice))
            else:
                text = next(generated)
                columns["texts"].append(text)
                columns["scores"].append(RULES[item.match](cleaned(text), item.references))
            rows = reference if variant == original else _answer_rows(engine, variant, item)
            right = _answer_tokens(item)
            for name, value in compare(rows, reference, right).items():
                columns[name].append(value)
        record[key] = columns
    return record


def _generated(engine: VariantModels, variant: Variant, items: Sequence[Item]) -> list[str]:
    asked = [item for item in items if not item.choices]
    return engine.generate(variant, asked) if asked else []


def _answer_tokens(item: Item) -> Sequence[int]:
    return item.forced[item.forced_from :]


def _answer_rows(engine: VariantModels, variant: Variant, item: Item) -> torch.Tensor:
    """Log-probabilities of the rows that predict the reference: (tokens, vocabulary)."""
    first = item.forced_from - 1
    logits = engine.logits(variant, item.forced[:-1], first, item.forced_from)
    return logits.log_softmax(dim=-1)


def _choose(engine: VariantModels, variant: Variant, item: Item) -> int:
    """The choice whose tokens are the most likely together."""
    import torch

    sums = []
    for ids, begin in item.choices:
        rows = engine.logits(variant, ids[:-1], begin - 1, begin).log_softmax(dim=-1)
        tokens = torch.tensor(ids[begin:], device=rows.device)
        sums.append(float(rows.gather(1, tokens[:, None]).sum()))
    return max(range(len(sums)), key=sums.__getitem__)


def _choice_text(item: Item, chosen: int) -> Sequence[int]:
    ids, begin = item.choices[chosen]
    return ids[begin:]


def compare(rows: torch.Tensor, reference: torch.Tensor, right: Sequence[int]) -> dict[str, Any]:
    """How a variant's predictions differ from the original's on known tokens.

    Args:
        rows, reference: log-probabilities of the variant and of the original, (tokens, vocabulary).
        right: the tokens that came next.

    Returns:
        The columns `nll`, `kl`, `agreement`, `lost` and `won` of `Answers`.

    Raises:
        DataError: a loss is not a finite number.
    """
    import torch

    tokens = torch.tensor(list(right), device=rows.device)
    nll = -float(rows.gather(1, tokens[:, None]).mean())
    # Rounding may leave the divergence of equal distributions a hair below zero.
    kl = max(0.0, float((reference.exp() * (reference - rows)).sum(dim=1).mean()))
    if not (nll < float("inf") and kl < float("inf")):
        raise DataError(
            "the model's loss is not a finite number",
            got=nll,
            next_step="try --dtype float32 or bfloat16; if it stays, the weights are damaged",
        )
    best, expected = rows.argmax(dim=1), reference.argmax(dim=1)
    return {
        "nll": nll,
        "kl": kl,
        "agreement": float((best == expected).float().mean()),
        "lost": int(((expected == tokens) & (best != tokens)).sum()),
        "won": int(((expected != tokens) & (best == tokens)).sum()),
    }


def read_text(bench: Bench, chunks: Sequence[tuple[int, ...]]) -> dict[str, Language]:
    """Every variant on every chunk of text, by variant name; empty without chunks.

    Raises:
        ScoresError, DataError: as in `answer`.
    """
    if not chunks:
        return {}
    original = bench.variants[0]

    def measure(chunk: tuple[int, ...]) -> dict[str, Any]:
        engine = bench.engine()
        reference = engine.logits(original, chunk[:-1], 0).log_softmax(dim=-1)
        record: dict[str, Any] = {}
        for key, variant in bench.different.items():
            rows = (
                reference
                if variant == original
                else engine.logits(variant, chunk[:-1], 0).log_softmax(dim=-1)
            )
            found = compare(rows, reference, chunk[1:])
            record[key] = {name: found[name] for name in Language.__annotations__}
        return record

    records = bench.resumable("language", bench.fingerprint(chunks), chunks, measure)
    return {
        variant.name: Language(
            **{
                name: tuple(record[variant.key][name] for record in records)
                for name in Language.__annotations__
            }
        )
        for variant in bench.variants
    }


def short_context(bench: Bench, texts: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """The largest logit difference to full attention within the window, by variant name.

    Where no row's window ends before the text begins, sliding hides nothing: the difference is
    nil. `spread` is the standard deviation of the logits it is held against.

    Args:
        bench: the models; `{}` for one that was not converted.
        texts: token ids, of which the first `window_tokens` are used.
    """
    if bench.mask is None or not texts:
        return {}
    engine, window = bench.engine(), bench.mask.window_tokens
    full = Variant("full", tuple(range(bench.source.shape.layers)), "all")
    worst = {variant.name: 0.0 for variant in bench.variants if not variant.separate}
    spread = 0.0
    for text in texts:
        short = text[:window]
        reference = engine.logits(full, short, 0)
        spread = max(spread, float(reference.std()))
        for variant in bench.variants:
            if not variant.separate:
                apart = float((engine.logits(variant, short, 0) - reference).abs().max())
                worst[variant.name] = max(worst[variant.name], apart)
    return worst | {"spread": spread}


def time_variants(bench: Bench, prompt_tokens: int, runs: int) -> dict[str, Speed]:
    """Prefill and decode seconds of every variant, in turns, by variant name.

    One round more than `runs` is run: the first one warms up.
    """
    if not runs:
        return {}

    def measure(round_number: int) -> dict[str, Any]:
        del round_number
        engine = bench.engine()
        return {
            key: _timed(engine.running(variant), prompt_tokens, bench.source.shape.vocabulary)
            for key, variant in bench.different.items()
        }

    fingerprint = bench.fingerprint([prompt_tokens, runs])
    records = bench.resumable("speed", fingerprint, range(runs + 1), measure)[1:]
    return {
        variant.name: Speed(
            tuple(record[variant.key][0] for record in records),
            tuple(record[variant.key][1] for record in records),
        )
        for variant in bench.variants
    }


def _timed(model: Any, prompt_tokens: int, vocabulary: int) -> list[float]:
    """Seconds of one prefill, and of one decoded token."""
    import torch

    ids = torch.arange(prompt_tokens, device=model.device)[None] * 7919 % vocabulary
    with torch.inference_mode():
        started = _now(model)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        filled = _now(model)
        for _ in range(_DECODED_TOKENS):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        done = _now(model)
    return [filled - started, (done - filled) / _DECODED_TOKENS]


def _now(model: Any) -> float:
    """The time, once the device has finished its work."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def chunks_of(
    tokenizer: Any, text: str, chunk_tokens: int, most: int, where: Path
) -> Iterator[tuple[int, ...]]:
    """Chunks of a text, evenly spread over it, each behind what the tokenizer starts a text with.

    Args:
        tokenizer: a transformers tokenizer.
        text: any text.
        chunk_tokens: tokens of a chunk, special ones included.
        most: how many chunks at most.
        where: the text's name in messages.

    Raises:
        DataError: the text is shorter than a chunk.
    """
    start = tuple(tokenizer.encode(""))
    # White space ends differ from file to file, and models read one kind.
    ids = tokenizer.encode("\n".join(text.splitlines()), add_special_tokens=False)
    size = chunk_tokens - len(start)
    count = min(len(ids) // size, most)
    if not count:
        raise DataError(
            "the text is too short to measure language on",
            where=where,
            expected=f"at least {size} tokens",
            got=f"{len(ids)} tokens",
            next_step="give a longer text, or a smaller --text-tokens",
        )
    places = len(ids) // size
    for number in range(count):
        begin = (number * places // count) * size
        yield (*start, *ids[begin : begin + size])
