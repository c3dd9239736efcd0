"""The straight line of an evaluation: model -> variants -> items -> measurements -> evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converter import __version__
from converter.checkpoint.format import SOURCE_CONFIG
from converter.checkpoint.reader import open_checkpoint
from converter.common.errors import CheckpointError, DataError, UsageError
from converter.common.progress import Progress, quiet_libraries
from converter.evaluation.cost import costs
from converter.evaluation.harness import HarnessSettings, check_installed, run_harness
from converter.evaluation.metrics import (
    Bench,
    answer,
    chunks_of,
    read_text,
    short_context,
    time_variants,
)
from converter.evaluation.models import VariantModels, load_checkpoint, load_source
from converter.evaluation.results import Evaluation
from converter.evaluation.tasks.item import Prompter
from converter.evaluation.tasks.table import TaskSettings, ask, choose_lengths, expand
from converter.evaluation.variants import VariantSettings, original_of, variants_of
from converter.inference.load import Placement
from converter.inference.tokenizer import load_tokenizer
from converter.model.source import Source, open_source
from converter.plan.plan import Plan

# Texts that the short-context check runs on.
_SHORT_TEXTS = 8
# Tokens decoded while speed is measured, which must fit the context too.
_ROOM_TO_DECODE = 20


@dataclass(frozen=True)
class Model:
    """What is evaluated.

    Attributes:
        name: how the user named it.
        folder: where its files are.
        source: the model, or the one inside a checkpoint of ours.
        plan: the checkpoint's; None for a model that was not converted.
        against: the source as given apart, run under transformers' own class; None without.
    """

    name: str
    folder: Path
    source: Source
    plan: Plan | None
    against: Source | None


@dataclass(frozen=True)
class EvaluateSettings:
    """What to measure.

    Attributes:
        tasks: what to ask.
        variants: which plans to compare.
        text: a text to measure language on; None for none.
        text_tokens: tokens of a chunk of it; None for the longest length asked.
        text_chunks: how many chunks at most.
        batch: items generated at once.
        speed_runs: runs of each variant to time; 0 for none.
        harness: lm-eval's tasks.
        trust: run Python files of the checkpoint that are not this version's.
    """

    tasks: TaskSettings
    variants: VariantSettings
    text: Path | None
    text_tokens: int | None
    text_chunks: int
    batch: int
    speed_runs: int
    harness: HarnessSettings
    trust: bool


@dataclass(frozen=True)
class EvaluateWork:
    """Where progress is kept, and how it is shown."""

    folder: Path
    fresh: bool
    progress: Progress


def open_model(name: str, against: str | None, *, revision: str | None, offline: bool) -> Model:
    """A checkpoint of ours, or any model that could be converted.

    Raises:
        CheckpointError: the checkpoint is damaged, or was made from another model than `against`.
        SourceError: there is no such model, or it cannot be used.
    """
    folder = Path(name)
    if not (folder / SOURCE_CONFIG).is_file():
        if against is not None:
            raise UsageError(
                "only a checkpoint can be held against its source",
                where="--against",
                got=f"{name}, which was not converted",
            )
        source = open_source(name, revision=revision, offline=offline)
        return Model(source.name, source.folder, source, None, None)
    source, plan = open_checkpoint(folder)
    other = None
    if against is not None:
        other = open_source(against, revision=revision, offline=offline)
        if other.fingerprint != source.fingerprint:
            raise CheckpointError(
                "the checkpoint was not made from this model",
                where=f"--against {against}",
                expected=source.name,
                got=other.name,
                next_step="compare them with: hybridize verify CHECKPOINT --against SOURCE",
            )
    return Model(folder.resolve().name, folder, source, plan, other)


def evaluate(
    model: Model, settings: EvaluateSettings, placement: Placement, work: EvaluateWork
) -> Evaluation:
    """Measure everything that was asked for.

    Raises:
        HybridizeError: bad input, results of another evaluation, or a model that answers nothing.
    """
    source, plan = model.source, model.plan
    expand(settings.tasks.tasks)
    if settings.harness.tasks:
        check_installed()
    context = source.shape.context_tokens
    if plan is None:
        _refuse_plans(settings.variants)
        variants: tuple[Any, ...] = (original_of(source, separate=False),)
    else:
        variants = variants_of(source, plan, settings.variants)
    quiet_libraries()
    tokenizer: Any = load_tokenizer(model.folder, _config(model))
    asked = ask(Prompter(tokenizer), settings.tasks, context, source.shape.vocabulary)
    text_tokens = settings.text_tokens or max(choose_lengths(settings.tasks, context))
    if text_tokens > context:
        raise UsageError(
            "chunks of text would be longer than the model's context",
            where="--text-tokens",
            expected=f"at most {context}",
            got=text_tokens,
        )
    chunks = (
        ()
        if settings.text is None
        else tuple(
            chunks_of(
                tokenizer,
                _read(settings.text),
                text_tokens,
                settings.text_chunks,
                settings.text,
            )
        )
    )
    if not (asked.items or chunks or settings.harness.tasks or settings.speed_runs):
        raise DataError(
            "there is nothing to evaluate on",
            next_step="name --tasks, --rows, --text or --harness",
        )
    mask = None if plan is None else plan.mask
    bench = Bench(
        source=source,
        mask=mask,
        variants=variants,
        engine=cache(lambda: _engine(model, tokenizer, placement, trust=settings.trust)),
        placement=placement,
        batch=settings.batch,
        work=work.folder,
        fresh=work.fresh,
        progress=work.progress,
    )
    texts = [*chunks, *(item.forced for item in asked.items)]
    answers = answer(bench, asked.items)
    speed_tokens = max(choose_lengths(settings.tasks, context)) - _ROOM_TO_DECODE
    return Evaluation(
        model=model.name,
        mask=mask,
        variants=variants,
        items=asked.items,
        answers=answers,
        text_tokens=text_tokens,
        language=read_text(bench, chunks),
        regression=short_context(bench, texts[:_SHORT_TEXTS]),
        cost=costs(source, variants, mask),
        speed=time_variants(bench, max(speed_tokens, 1), settings.speed_runs),
        speed_tokens=max(speed_tokens, 1),
        harness=run_harness(bench, settings.harness),
        dropped=asked.dropped,
        provenance=_provenance(model, settings, placement),
    )


def _refuse_plans(settings: VariantSettings) -> None:
    asked = {
        "--budgets": settings.budgets,
        "--periodic": settings.periodic,
        "--plan": settings.plans,
    }
    for option, value in asked.items():
        if value:
            raise UsageError(
                "plans are compared on a checkpoint, and this model was not converted",
                where=option,
                next_step="make one with: hybridize convert SOURCE OUT",
            )


def _config(model: Model) -> Any:
    """The configuration that the tokenizer needs where a checkpoint's own would run code."""
    if model.plan is None:
        return None
    from transformers import AutoConfig

    config = model.source.config
    return AutoConfig.for_model(**{k: v for k, v in config.items() if k != "auto_map"})


def _engine(model: Model, tokenizer: Any, placement: Placement, *, trust: bool) -> VariantModels:
    if model.plan is None:
        return VariantModels(load_source(model.source, placement), None, tokenizer)
    loaded = load_checkpoint(model.folder, model.source, model.plan, placement, trust=trust)
    source = None if model.against is None else load_source(model.against, placement)
    return VariantModels(loaded, source, tokenizer)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError("a text cannot be read", where=path, got=reason) from error


def _provenance(
    model: Model, settings: EvaluateSettings, placement: Placement
) -> Mapping[str, Any]:
    plan = model.plan
    return {
        "tool": f"hybridize {__version__}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "source": model.source.name,
        "revision": model.source.revision,
        "fingerprint": model.source.fingerprint,
        "against": None if model.against is None else model.against.name,
        "plan": None if plan is None else plan.to_json(),
        "layers": model.source.shape.layers,
        "context_tokens": model.source.shape.context_tokens,
        "dtype": placement.dtype,
        "device": placement.device,
        "seed": settings.tasks.seed,
        "samples": settings.tasks.samples,
        "text": None if settings.text is None else settings.text.name,
        "haystack": None if settings.tasks.haystack is None else settings.tasks.haystack.name,
        "harness": asdict(settings.harness)
        | {"include": None if settings.harness.include is None else settings.harness.include.name},
    }
