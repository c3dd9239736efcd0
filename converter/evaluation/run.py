"""The straight line of an evaluation: model -> variants -> items -> measurements -> report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converter import __version__
from converter.calibration.scores import Scores
from converter.calibration.scores_file import load_scores
from converter.checkpoint.format import SCORES_FILE, SOURCE_CONFIG
from converter.checkpoint.reader import open_checkpoint
from converter.common.errors import CheckpointError, DataError, UsageError
from converter.common.files import clear_files
from converter.common.progress import Progress, quiet_libraries
from converter.evaluation import metrics
from converter.evaluation.cost import costs
from converter.evaluation.harness import HarnessSettings, check_installed, run_harness
from converter.evaluation.metrics import Chunks, EvaluationRun
from converter.evaluation.models import VariantModels, VariantSettings, load_source, variants_of
from converter.evaluation.report import check_report_place, write_report
from converter.evaluation.summary import Evaluation, summarize
from converter.evaluation.tasks.item import Items, Prompter
from converter.evaluation.tasks.table import TaskSettings, choose_lengths, expand, make_items
from converter.inference.load import Placement, load_checkpoint, resolve_placement
from converter.inference.tokenizer import load_tokenizer
from converter.model.source import Source, open_source
from converter.plan.plan import Plan

# Texts that the short-context check runs on, and room for the tokens decoded while timing.
_SHORT_TEXTS, _ROOM_TO_DECODE = 8, 20


@dataclass(frozen=True)
class ModelSettings:
    """A checkpoint of ours, or a model folder or Hub id (of a revision) that was not converted.

    `against` is the checkpoint's source, to run apart under transformers' own class; `trust` runs
    Python files of the checkpoint that are not this version's.
    """

    name: str
    against: str | None
    revision: str | None
    offline: bool
    trust: bool


@dataclass(frozen=True)
class EvaluateSettings:
    """What to measure, and where the results go.

    Attributes:
        tasks, variants, harness: what to ask, which plans to compare, and lm-eval's tasks.
        text, text_chunks: a text to measure language on or None, and how many chunks of it at most.
        text_tokens: tokens of a chunk; None for the longest length asked.
        batch: items generated at once.
        speed_runs: runs of each variant to time; 0 for none.
        device, dtype: as the user wrote them.
        out: the report's folder; None for one named after the model.
        work: folder for progress; None for one beside the report, removed in the end.
        force, fresh: replace a report that is there; forget what an earlier run left in `work`.
    """

    model: ModelSettings
    tasks: TaskSettings
    variants: VariantSettings
    harness: HarnessSettings
    text: Path | None
    text_tokens: int | None
    text_chunks: int
    batch: int
    speed_runs: int
    device: str
    dtype: str
    out: Path | None
    force: bool
    work: Path | None
    fresh: bool


@dataclass(frozen=True)
class _Model:
    """An opened model: a source, or a checkpoint with its plan and what that was decided from."""

    name: str
    folder: Path
    source: Source
    plan: Plan | None = None
    scores: Scores | None = None
    against: Source | None = None


def evaluate(settings: EvaluateSettings, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Measure everything that was asked for, and write the report.

    Returns:
        The report's folder, and all that was measured as one JSON object.

    Raises:
        HybridizeError: bad input, a place that cannot be written to, results of another
            evaluation, or a model that answers nothing.
    """
    model = _open_model(settings.model)
    out = settings.out or Path(f"{model.name.replace('/', '-')}-evaluation")
    check_report_place(out, force=settings.force)
    placement = resolve_placement(settings.device, settings.dtype)
    expand(settings.tasks.tasks)
    if settings.harness.tasks:
        check_installed()
    variants = variants_of(model.source, model.plan, settings.variants)
    quiet_libraries()
    tokenizer: Any = load_tokenizer(model.folder, model.source.config)
    shape = model.source.shape
    items = make_items(Prompter(tokenizer), settings.tasks, shape.context_tokens, shape.vocabulary)
    chunks = _chunks(settings, tokenizer, shape.context_tokens)
    if not (items.items or chunks or settings.harness.tasks or settings.speed_runs):
        raise DataError(
            "there is nothing to evaluate on",
            next_step="name --tasks, --rows, --text or --harness",
        )
    run = EvaluationRun(
        source=model.source,
        mask=None if model.plan is None else model.plan.mask,
        variants=variants,
        models=cache(lambda: _load_models(model, tokenizer, placement, trust=settings.model.trust)),
        placement=placement,
        batch=settings.batch,
        work=settings.work or out.parent / f"{out.name}.work",
        fresh=settings.fresh,
        progress=progress,
    )
    summary = summarize(_measure(run, model, settings, items, chunks))
    for one in filter(None, (model.source, model.against)):
        one.files.check()
    write_report(out, summary, model.scores)
    if settings.work is None:
        clear_files(run.work, [f"{part}.jsonl" for part in metrics.PARTS])
    return out, summary


def _open_model(settings: ModelSettings) -> _Model:
    """A checkpoint of ours, or any model that could be converted."""
    folder, against = Path(settings.name), settings.against
    revision, offline = settings.revision, settings.offline
    if not (folder / SOURCE_CONFIG).is_file():
        if against is not None:
            raise UsageError(
                "only a checkpoint can be held against its source",
                where="--against",
                got=f"{settings.name}, which was not converted",
            )
        source = open_source(settings.name, revision=revision, offline=offline)
        return _Model(source.name, source.folder, source)
    source, plan = open_checkpoint(folder)
    other = None
    if against is not None:
        other = open_source(against, revision=revision, offline=offline)
        if other.identity != source.identity:
            raise CheckpointError(
                "the checkpoint was not made from this model",
                where=f"--against {against}",
                expected=source.name,
                got=other.name,
                next_step="compare them with: hybridize verify CHECKPOINT --against SOURCE",
            )
    path = folder / SCORES_FILE
    scores = load_scores(path) if path.is_file() else None
    if scores is not None:
        scores.check_model(source)
    return _Model(folder.resolve().name, folder, source, plan, scores, other)


def _chunks(settings: EvaluateSettings, tokenizer: Any, context_tokens: int) -> Chunks:
    chunk_tokens = settings.text_tokens or max(choose_lengths(settings.tasks, context_tokens))
    if chunk_tokens > context_tokens:
        raise UsageError(
            "chunks of text would be longer than the model's context",
            where="--text-tokens",
            expected=f"at most {context_tokens}",
            got=chunk_tokens,
        )
    if settings.text is None:
        return ()
    return metrics.chunks_of(tokenizer, settings.text, chunk_tokens, settings.text_chunks)


def _load_models(
    model: _Model, tokenizer: Any, placement: Placement, *, trust: bool
) -> VariantModels:
    if model.plan is None:
        return VariantModels(load_source(model.source, placement), None, tokenizer)
    loaded = load_checkpoint(
        model.folder, model.source, model.plan, placement, trust=trust, switches_plans=True
    )
    source = None if model.against is None else load_source(model.against, placement)
    return VariantModels(loaded, source, tokenizer)


def _measure(
    run: EvaluationRun, model: _Model, settings: EvaluateSettings, items: Items, chunks: Chunks
) -> Evaluation:
    texts = [*chunks, *(item.forced for item in items.items)]
    longest_tokens = max(choose_lengths(settings.tasks, run.source.shape.context_tokens))
    speed_tokens = max(longest_tokens - _ROOM_TO_DECODE, 1)
    return Evaluation(
        model=model.name,
        mask=run.mask,
        variants=run.variants,
        items=items.items,
        answers=metrics.answer_items(run, items.items),
        text_tokens=len(chunks[0]) if chunks else 0,
        language=metrics.measure_text(run, chunks),
        regression=metrics.short_context(run, texts[:_SHORT_TEXTS]),
        cost=costs(run.source, run.variants, run.mask),
        speed=metrics.time_variants(run, speed_tokens, settings.speed_runs),
        speed_tokens=speed_tokens,
        harness=run_harness(run, settings.harness),
        dropped=items.dropped,
        provenance=_provenance(model, settings, run.placement),
    )


def _provenance(model: _Model, settings: EvaluateSettings, placement: Placement) -> dict[str, Any]:
    source, tasks, harness = model.source, settings.tasks, settings.harness
    return {
        "tool": f"hybridize {__version__}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "source": source.name,
        "revision": source.revision,
        "fingerprint": source.fingerprint,
        "weights": source.weight_hashes,
        "against": None if model.against is None else model.against.name,
        "plan": None if model.plan is None else model.plan.to_json(),
        "layers": source.shape.layers,
        "context_tokens": source.shape.context_tokens,
        "dtype": placement.dtype,
        "device": placement.device,
        "seed": tasks.seed,
        "samples": tasks.samples,
        "text": settings.text and settings.text.name,
        "haystack": tasks.haystack and tasks.haystack.name,
        "harness": asdict(harness) | {"include": harness.include and harness.include.name},
    }
