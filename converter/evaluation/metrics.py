"""Measuring, logged after every batch: a killed evaluation goes on and gives the same result."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.calibration.cache import open_log
from converter.calibration.data.sources import read_text
from converter.calibration.evaluator import check_finite
from converter.common.errors import DataError
from converter.common.progress import Progress
from converter.evaluation.models import Variant, VariantModels
from converter.evaluation.tasks.item import Item, cleaned, score
from converter.inference.load import Placement
from converter.model.mask import Mask
from converter.model.source import Source

if TYPE_CHECKING:
    import torch

Record = Mapping[str, Any]
Chunks = tuple[tuple[int, ...], ...]

# Logs in the work folder.
PARTS = ("tasks", "language", "speed", "harness")
_DECODED_TOKENS = 16
# Rows of logits that are compared at once: with a vocabulary of 150 000, 150 MB in float32.
_ROWS = 256


@dataclass(frozen=True)
class Answers:
    """One variant's answers; every tuple has one entry for each item.

    Attributes:
        texts: what was generated, or the chosen option.
        scores: 0 to 1.
        nll: mean loss on the reference's tokens, nats per token.
        kl: mean Kullback-Leibler divergence from the original on them, nats per token.
        agreement: share of them where the most likely token is the original's.
        lost, won: how many of them only the original, or only this variant, has right.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    lost: tuple[int, ...]
    won: tuple[int, ...]


@dataclass(frozen=True)
class Language:
    """One variant on chunks of text: as in `Answers`, one entry for each chunk."""

    nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Each run's seconds for one prompt until its last logits, and for one generated token."""

    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]


@dataclass(frozen=True)
class EvaluationRun:
    """What measurements run on; equal runs give equal results.

    Attributes:
        mask: what sliding layers see; None for a plain model.
        variants: what to compare, the original first.
        models: loads them when the first forward pass needs them.
        batch: items generated at once.
        work: folder for what must survive a kill.
        fresh: forget what an earlier run left there.
    """

    source: Source
    mask: Mask | None
    variants: tuple[Variant, ...]
    models: Callable[[], VariantModels]
    placement: Placement
    batch: int
    work: Path
    fresh: bool
    progress: Progress

    @property
    def original(self) -> Variant:
        """What the others are compared with."""
        return self.variants[0]

    @property
    def different(self) -> dict[str, Variant]:
        """One variant for everything that is computed, by key: names may share a computation."""
        return {variant.key: variant for variant in reversed(self.variants)}

    def resumable(
        self, part: str, what: object, pieces: Sequence[Any], measure: Callable[[Any], Record]
    ) -> list[Record]:
        """Measure every piece that no earlier run finished; all records in order.

        Args:
            part: out of `PARTS`.
            what: all that the results depend on beside the run itself, as plain JSON values.
            pieces: what `measure` makes a record of.

        Raises:
            ScoresError: the work folder holds results of another evaluation.
        """
        fingerprint = {
            **self.source.identity,
            "mask": None if self.mask is None else self.mask.to_json(),
            "plans": [variant.key for variant in self.variants],
            "questions": hashlib.sha256(json.dumps(what).encode()).hexdigest(),
            "batch": self.batch,
            "dtype": self.placement.dtype,
            "device": self.placement.device.split(":")[0],
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        with open_log(self.work / f"{part}.jsonl", fingerprint, fresh=self.fresh) as log:
            records = list(log.records)[: len(pieces)]
            remaining = pieces[len(records) :]
            if not remaining:
                return records
            with self.progress(part, len(remaining)) as bar:
                for piece in remaining:
                    records.append(measure(piece))
                    # Before it is kept: it may be of other weights, or of a mixture.
                    self.source.files.check()
                    log.append(records[-1])
                    bar.advance(1)
        return records


def answer_items(run: EvaluationRun, items: Sequence[Item]) -> dict[str, Answers]:
    """Every variant's answers to every item, by variant name; empty without items.

    Raises:
        ScoresError: the work folder holds results of another evaluation.
        DataError: the original never answers anything, or a loss is not a finite number.
    """
    if not items:
        return {}
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(items)), key=lambda i: (len(items[i].prompt), i))
    positions = sorted(range(len(items)), key=order.__getitem__)
    records = run.resumable(
        "tasks",
        [astuple(item) for item in items],
        [order[i : i + run.batch] for i in range(0, len(order), run.batch)],
        lambda batch: _answer_batch(run, [items[i] for i in batch]),
    )

    def answers(key: str) -> Answers:
        columns = {
            name: [value for record in records for value in record[key][name]]
            for name in Answers.__annotations__
        }
        return Answers(**{n: tuple(column[i] for i in positions) for n, column in columns.items()})

    # An original that says nothing cannot show what a plan lost.
    if not any(text.strip() for text in answers(run.original.key).texts):
        raise DataError(
            "the model answers nothing: every text it generated is empty",
            got=f"{len(items)} answers without a word",
            next_step="check its generation config (the end-of-text token) and its chat template",
        )
    return {variant.name: answers(variant.key) for variant in run.variants}


def _answer_batch(run: EvaluationRun, items: Sequence[Item]) -> Record:
    """One batch under every variant, as columns by variant key."""
    models = run.models()
    compared = [_compared(run, item.forced, item.forced_from, item.forced_from) for item in items]
    record: dict[str, Any] = {}
    for key, variant in run.different.items():
        generated = iter(models.generate(variant, [item for item in items if not item.choices]))
        found = []
        for item, losses in zip(items, compared, strict=True):
            if item.choices:
                chosen = _likeliest_choice(models, variant, item)
                ids, begin = item.choices[chosen]
                text = models.tokenizer.decode(ids[begin:])
                scored = float(chosen == item.right_choice)
            else:
                text = next(generated)
                scored = score(cleaned(text), item.references, item.match)
            found.append({"texts": text, "scores": scored, **losses[key]})
        record[key] = {name: [each[name] for each in found] for name in Answers.__annotations__}
    return record


def _likeliest_choice(models: VariantModels, variant: Variant, item: Item) -> int:
    """The choice whose tokens are the most likely together."""
    import torch

    sums = []
    for ids, begin in item.choices:
        states = models.states(variant, ids[:-1], begin - 1, begin)
        predicted = models.log_probabilities(variant, states)
        tokens = torch.tensor(ids[begin:], device=predicted.device)
        sums.append(float(predicted.gather(1, tokens[:, None]).sum()))
    return sums.index(max(sums))


def _compared(
    run: EvaluationRun, ids: Sequence[int], begin: int, prompt_tokens: int | None = None
) -> dict[str, dict[str, Any]]:
    """`compare` of every variant with the original on the tokens from `begin` on, by key."""
    import torch

    models, right = run.models(), ids[begin:]
    reference = models.states(run.original, ids[:-1], begin - 1, prompt_tokens)

    def pieces(variant: Variant) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        same, text = variant == run.original, (ids[:-1], begin - 1, prompt_tokens)
        own = reference if same else models.states(variant, *text)
        both = (torch.split(states, _ROWS) for states in (own, reference))
        for rows, expected in zip(*both, strict=True):
            theirs = models.log_probabilities(run.original, expected)
            yield theirs if same else models.log_probabilities(variant, rows), theirs

    return {key: compare(pieces(variant), right) for key, variant in run.different.items()}


def compare(
    pieces: Iterable[tuple[torch.Tensor, torch.Tensor]], right: Sequence[int]
) -> dict[str, Any]:
    """How a variant's predictions differ from the original's on known tokens.

    Args:
        pieces: log-probabilities of both on some tokens after others, each (tokens, vocabulary).
        right: the tokens that came next.

    Returns:
        The columns `nll`, `kl`, `agreement`, `lost` and `won` of `Answers`.

    Raises:
        DataError: a loss is not a finite number.
    """
    import torch

    nll = kl = 0.0
    agreed = lost = won = begin = 0
    for predicted, reference in pieces:
        known = list(right[begin : begin + len(predicted)])
        begin += len(predicted)
        tokens = torch.tensor(known, device=predicted.device)
        nll -= float(predicted.gather(1, tokens[:, None]).double().sum())
        kl += float((reference.exp() * (reference - predicted)).sum(dim=1).double().sum())
        best, expected = predicted.argmax(dim=1), reference.argmax(dim=1)
        agreed += int((best == expected).sum())
        lost += int(((expected == tokens) & (best != tokens)).sum())
        won += int(((expected != tokens) & (best == tokens)).sum())
    nll, kl = nll / len(right), kl / len(right)
    check_finite([nll, kl])
    # Rounding may leave the divergence of equal distributions a hair below zero.
    found = {"nll": nll, "kl": max(0.0, kl), "agreement": agreed / len(right)}
    return {**found, "lost": lost, "won": won}


def measure_text(run: EvaluationRun, chunks: Chunks) -> dict[str, Language]:
    """Every variant on every chunk of text, by variant name; empty without chunks.

    Raises:
        ScoresError, DataError: as in `answer_items`.
    """
    if not chunks:
        return {}
    columns = Language.__annotations__

    def measure(chunk: tuple[int, ...]) -> Record:
        compared = _compared(run, chunk, 1)
        return {key: {name: found[name] for name in columns} for key, found in compared.items()}

    records = run.resumable("language", chunks, chunks, measure)
    return {
        variant.name: Language(**{n: tuple(r[variant.key][n] for r in records) for n in columns})
        for variant in run.variants
    }


def short_context(run: EvaluationRun, texts: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """The largest logit difference to full attention within the window, by variant name.

    Where no position's window ends before the text begins, sliding hides nothing: the difference
    is nil. `spread` is the standard deviation of the logits that it is a share of. Empty for a
    model that was not converted; of the texts' token ids the first `window_tokens` are used.
    """
    import torch

    if run.mask is None or not texts:
        return {}
    models, window = run.models(), run.mask.window_tokens
    full = Variant("full", run.source.shape.full_layers, "all")
    compared = [variant for variant in run.variants if not variant.separate]
    worst = {variant.name: 0.0 for variant in compared}
    spread = 0.0
    for text in texts:
        short = text[:window]
        states = [torch.split(models.states(v, short, 0), _ROWS) for v in (full, *compared)]
        count, total, squares = 0, 0.0, 0.0
        for rows, *others in zip(*states, strict=True):
            reference = models.logits(full, rows).double()
            count += reference.numel()
            total, squares = total + float(reference.sum()), squares + float(reference.pow(2).sum())
            for variant, own in zip(compared, others, strict=True):
                difference = float((models.logits(variant, own) - reference).abs().max())
                worst[variant.name] = max(worst[variant.name], difference)
        spread = max(spread, math.sqrt((squares - total**2 / count) / (count - 1)))
    return worst | {"spread": spread}


def time_variants(run: EvaluationRun, prompt_tokens: int, runs: int) -> dict[str, Speed]:
    """Prefill and decode seconds of every variant, in turns after a round to warm up, by name."""
    if not runs:
        return {}

    def measure(_: int) -> Record:
        models, vocabulary = run.models(), run.source.shape.vocabulary
        return {
            key: _timed(models.running(variant), prompt_tokens, vocabulary)
            for key, variant in run.different.items()
        }

    records = run.resumable("speed", [prompt_tokens, runs], range(runs + 1), measure)[1:]
    return {
        variant.name: Speed(*zip(*(record[variant.key] for record in records), strict=True))
        for variant in run.variants
    }


def _timed(model: Any, prompt_tokens: int, vocabulary: int) -> list[float]:
    """Seconds of one prefill, and of one decoded token; models may recall others' positions."""
    import torch

    ids = torch.arange(prompt_tokens, device=model.device)[None] * 7919 % vocabulary
    with torch.inference_mode():
        started = _now(model)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        filled = _now(model)
        for place in range(prompt_tokens, prompt_tokens + _DECODED_TOKENS):
            token = out.logits[:, -1:].argmax(dim=-1)
            at = torch.full_like(token, place)
            out = model(token, position_ids=at, past_key_values=out.past_key_values, use_cache=True)
        return [filled - started, (_now(model) - filled) / _DECODED_TOKENS]


def _now(model: Any) -> float:
    """The time, once the device has finished."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def chunks_of(tokenizer: Any, path: Path, chunk_tokens: int, most: int) -> Chunks:
    """Chunks of a text, evenly spread over it, each behind what the tokenizer starts a text with.

    The tokenizer is transformers'; `chunk_tokens` count what it starts a text with.

    Raises:
        DataError: the text cannot be read, or is shorter than a chunk.
    """
    start = tuple(tokenizer.encode(""))
    # White space ends differ from file to file, and models read one kind.
    text = "\n".join(read_text(path).splitlines())
    ids = tokenizer.encode(text, add_special_tokens=False)
    size = chunk_tokens - len(start)
    possible = len(ids) // size
    if not possible:
        raise DataError(
            "the text is too short to measure language on",
            where=path,
            expected=f"at least {size} tokens",
            got=f"{len(ids)} tokens",
            next_step="give a longer text, or a smaller --text-tokens",
        )
    count = min(possible, most)
    begins = [(number * possible // count) * size for number in range(count)]
    return tuple((*start, *ids[begin : begin + size]) for begin in begins)
