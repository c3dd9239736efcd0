"""The plans that an evaluation compares, all run by one loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.calibration.selectors import PERIODIC, SELECTORS, periodic_layers, periodic_offsets
from converter.common.errors import PlanError
from converter.model.source import Source
from converter.plan.budget import parse_budget
from converter.plan.plan import Plan, load_plan

ORIGINAL, HYBRID = "original", "hybrid"


@dataclass(frozen=True)
class Variant:
    """One plan.

    Attributes:
        name: what tables call it.
        full_attention_layers: the layers that keep full attention, ascending.
        method: the selector that chose them; `all` for the original.
        separate: run the source under transformers' own class instead of the checkpoint.
    """

    name: str
    full_attention_layers: tuple[int, ...]
    method: str
    separate: bool = False

    @property
    def key(self) -> str:
        """Equal for variants that compute the same."""
        layers = ",".join(map(str, self.full_attention_layers))
        return f"source {layers}" if self.separate else layers


@dataclass(frozen=True)
class VariantSettings:
    """Which plans to compare beside the checkpoint's own.

    Attributes:
        budgets: budgets, by the checkpoint's ranking.
        periodic: also the periodic plans of every budget and of the checkpoint's plan, at every
            offset.
        plans: plan files.
        separate: measure the original under transformers' own class.
    """

    budgets: tuple[str, ...] = ()
    periodic: bool = False
    plans: tuple[Path, ...] = ()
    separate: bool = False


def original_of(source: Source, *, separate: bool) -> Variant:
    """The model as it was: every layer full."""
    return Variant(ORIGINAL, tuple(range(source.shape.layers)), "all", separate)


def variants_of(source: Source, plan: Plan, settings: VariantSettings) -> tuple[Variant, ...]:
    """The original, the checkpoint's plan, and what it is compared with.

    Raises:
        PlanError: a budget without a ranking, or a plan for another model or mask.
    """
    found = [
        original_of(source, separate=settings.separate),
        Variant(HYBRID, plan.full_attention_layers, plan.method),
        *_by_budget(source, plan, settings.budgets),
        *(_from_file(source, plan, path) for path in settings.plans),
    ]
    if settings.periodic:
        counts = {len(variant.full_attention_layers) for variant in found[1:]}
        found += _periodic(source.shape.layers, sorted(counts))
    unique = {variant.name: variant for variant in found}
    if len(unique) < len(found):
        raise PlanError("two plans have the same name", where="--plan", got=", ".join(unique))
    return tuple(found)


def _by_budget(source: Source, plan: Plan, budgets: Sequence[str]) -> Iterator[Variant]:
    if budgets and plan.ranking is None:
        raise PlanError(
            "the checkpoint's layers were not ranked, so a budget decides nothing",
            where="--budgets",
            next_step="compare plan files with --plan, or convert with a measuring --method",
        )
    for text in dict.fromkeys(budgets):
        count = parse_budget(text).layers(source.shape, plan.mask)
        layers = tuple(sorted((plan.ranking or ())[:count]))
        # A checkpoint that was retargeted by hand still has the ranking of its scores, and one of
        # periodic layers that won a contest that of the best method that measured.
        method = plan.method if plan.method in SELECTORS else "ranking"
        yield Variant(f"{method} {text}", layers, method)


def _from_file(source: Source, plan: Plan, path: Path) -> Variant:
    other = load_plan(path)
    other.check_depth(source.shape.layers, path)
    if other.mask != plan.mask:
        raise PlanError(
            "the plan has another mask than the checkpoint",
            where=path,
            expected=plan.mask,
            got=other.mask,
        )
    method = other.method.split(",")[0]
    return Variant(path.stem, other.full_attention_layers, method)


def _periodic(total: int, counts: Sequence[int]) -> list[Variant]:
    return [
        Variant(
            f"{PERIODIC.name} {count} of {total}, offset {offset}",
            periodic_layers(total, count, offset),
            PERIODIC.name,
        )
        for count in counts
        if 0 < count < total
        for offset in range(periodic_offsets(total, count))
    ]
