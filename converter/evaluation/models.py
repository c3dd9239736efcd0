"""What is compared: plans as variants, and the loaded models that run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.calibration.selectors import PERIODIC, SELECTORS, periodic_among, periodic_offsets
from converter.checkpoint.private import private_source
from converter.common.errors import PlanError, SourceError, UsageError, refusing
from converter.evaluation.tasks.item import Item
from converter.inference.load import Placement, load_folder
from converter.model.source import Source
from converter.plan.budget import parse_budget
from converter.plan.plan import Plan, kinds_of_units, load_plan
from converter.plan.units import Units

if TYPE_CHECKING:
    import torch

ORIGINAL, HYBRID = "original", "hybrid"


@dataclass(frozen=True)
class Variant:
    """One plan.

    Attributes:
        full_attention_layers: the layers that keep full attention as a whole, ascending.
        method: the selector that chose them; `all` for the original.
        separate: run the source under transformers' own class instead of the checkpoint.
        layer_types: of every layer, where KV heads of one attend differently; else empty.
        full_parts: how many layers those heads make up, with the layers above.
    """

    name: str
    full_attention_layers: tuple[int, ...]
    method: str
    separate: bool = False
    layer_types: tuple[str, ...] = ()
    full_parts: Fraction | None = None

    @property
    def full_layers(self) -> int | Fraction:
        """How many layers attend fully; KV heads count as parts of a layer."""
        return len(self.full_attention_layers) if self.full_parts is None else self.full_parts

    @property
    def key(self) -> str:
        """Equal for variants that compute the same."""
        layers = ",".join(self.layer_types or map(str, self.full_attention_layers))
        return f"source {layers}" if self.separate else layers


@dataclass(frozen=True)
class VariantSettings:
    """Which plans to compare beside the checkpoint's own.

    Attributes:
        budgets: by the checkpoint's ranking.
        periodic: also periodic plans of as many layers as each of the others, at every offset.
        plans: plan files.
        separate: measure the original under transformers' own class.
    """

    budgets: tuple[str, ...] = ()
    periodic: bool = False
    plans: tuple[Path, ...] = ()
    separate: bool = False


def variants_of(
    source: Source, plan: Plan | None, settings: VariantSettings
) -> tuple[Variant, ...]:
    """The original with every layer full, the checkpoint's plan, and what it is compared with.

    A model that was not converted has no plan, and nothing to compare with.

    Raises:
        PlanError: a budget without a ranking, or a plan for another model or mask.
        UsageError: plans are asked for where there is no checkpoint.
    """
    full_layers, total = source.shape.full_layers, len(source.shape.full_layers)
    original = Variant(ORIGINAL, full_layers, "all", settings.separate)
    if plan is None:
        options = ("--budgets", "--periodic", "--plan")
        values = (settings.budgets, settings.periodic, settings.plans)
        for option in (name for name, value in zip(options, values, strict=True) if value):
            raise UsageError(
                "plans are compared on a checkpoint, and this model was not converted",
                where=option,
                next_step="make one with: hybridize convert SOURCE OUT",
            )
        return (original,)
    found = [
        original,
        _of_plan(HYBRID, source, plan, plan.method),
        *_by_budget(source, plan, settings.budgets),
        *(_from_file(source, plan, path) for path in settings.plans),
    ]
    if settings.periodic:
        counts = {int(variant.full_layers) for variant in found[1:]} - {0, total}
        found += [
            Variant(
                f"{PERIODIC.name} {count} of {total}, offset {offset}",
                periodic_among(full_layers, count, offset),
                PERIODIC.name,
            )
            for count in sorted(counts)
            for offset in range(periodic_offsets(total, count))
        ]
    names = dict.fromkeys(variant.name for variant in found)
    if len(names) < len(found):
        raise PlanError("two plans have the same name", where="--plan", got=", ".join(names))
    return tuple(found)


def _by_budget(source: Source, plan: Plan, budgets: Sequence[str]) -> Iterator[Variant]:
    if budgets and plan.ranking is None:
        raise PlanError(
            "the checkpoint's layers were not ranked, so a budget decides nothing",
            where="--budgets",
            next_step="compare plan files with --plan, or convert with a measuring --method",
        )
    shape = source.shape
    for text in dict.fromkeys(budgets):
        units = Units(len(shape.full_layers), shape.kv_heads if plan.is_mixed else 1)
        count = parse_budget(text).count(units, shape, plan.mask)
        kinds = kinds_of_units((plan.ranking or ())[:count], shape, units)
        # A checkpoint that was retargeted by hand still has the ranking of its scores, and one of
        # periodic layers that won the comparison that of the best method that measured.
        method = plan.method if plan.method in SELECTORS else "ranking"
        chosen = replace(plan, layer_types=kinds)
        yield _of_plan(f"{method} {text}", source, chosen, method)


def _from_file(source: Source, plan: Plan, path: Path) -> Variant:
    other = load_plan(path)
    other.check_layers(source.shape, path)
    if other.mask != plan.mask:
        raise PlanError(
            "the plan has another mask than the checkpoint",
            where=path,
            expected=plan.mask,
            got=other.mask,
        )
    if other.is_mixed and not plan.is_mixed:
        raise PlanError(
            "the plan parts the KV heads of layers, which the checkpoint's code does not",
            where=path,
            next_step="convert by that plan, and compare this one there: a checkpoint of KV heads "
            "runs both",
        )
    return _of_plan(path.stem, source, other, other.method.split(",")[0])


def _of_plan(name: str, source: Source, plan: Plan, method: str) -> Variant:
    if not plan.is_mixed:
        return Variant(name, plan.full_attention_layers, method)
    full_layers = plan.full_layers(source.shape.kv_heads)
    return Variant(name, plan.full_attention_layers, method, False, plan.layer_types, full_layers)


class VariantModels:
    """A loaded checkpoint that can switch plans, or a plain model; and transformers' tokenizer.

    Also the source under transformers' own class, when variants ask for it.
    """

    def __init__(self, model: Any, source: Any, tokenizer: Any) -> None:
        self._model, self._source, self.tokenizer = model, source, tokenizer
        # A checkpoint of ours.
        self._switches_plans = hasattr(model, "set_full_attention_layers")

    def running(self, variant: Variant) -> Any:
        """The model that computes a variant; valid until the next call."""
        if variant.separate:
            return self._source
        if variant.layer_types:
            self._model.set_layer_kinds(variant.layer_types)
        elif self._switches_plans:
            self._model.set_full_attention_layers(list(variant.full_attention_layers))
        return self._model

    def generate(self, variant: Variant, items: Sequence[Item]) -> list[str]:
        """What a variant answers, greedily, all items as one left-padded batch.

        The cache is the model's own, which holds for each layer what its mask will read again.
        Each answer is cut to its item's room, so that it does not depend on the others.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence
        from transformers import GenerationConfig

        if not items:
            return []
        model = self.running(variant)
        prompts = [torch.tensor(item.prompt) for item in items]
        padded = partial(pad_sequence, batch_first=True, padding_side="left")
        ids, real = padded(prompts), padded([torch.ones_like(prompt) for prompt in prompts])
        stop = getattr(model.generation_config, "eos_token_id", None)
        with torch.inference_mode():
            output = model.generate(
                ids.to(model.device),
                attention_mask=real.to(model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(item.new_tokens for item in items),
                    do_sample=False,
                    # Any token will do: what follows an end is cut off below.
                    pad_token_id=0,
                    eos_token_id=stop,
                ),
            )
        ends = set(stop) if isinstance(stop, list) else {stop}
        texts = []
        for new, item in zip(output[:, ids.shape[1] :].tolist(), items, strict=True):
            room = new[: item.new_tokens]
            end = next((i for i, token in enumerate(room) if token in ends), len(room))
            texts.append(self.tokenizer.decode(room[:end], skip_special_tokens=True))
        return texts

    def states(
        self, variant: Variant, ids: Sequence[int], first: int, prompt_tokens: int | None = None
    ) -> torch.Tensor:
        """What leaves the last layer over one sequence, from a position on.

        (len(ids) - first, hidden), for `logits`; those of `first` predict the token after it.
        Generated tokens begin at `prompt_tokens`, for full attention in decode.
        """
        import torch

        from converter.inference.embed_and_head import states_above

        model = self.running(variant)
        # Only our own class must be told; a full model computes the same without.
        ours = self._switches_plans and not variant.separate
        options = {"prompt_length": prompt_tokens} if ours else {}
        with torch.inference_mode():
            inputs = torch.tensor([list(ids)], device=model.device)
            return states_above(model, input_ids=inputs, **options)[0, first:]

    def logits(self, variant: Variant, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits (rows, vocabulary) of rows of `states`.

        The vocabulary is wide, so a long text is read some rows at a time.
        """
        import torch

        from converter.inference.embed_and_head import logits_above

        with torch.inference_mode():
            return logits_above(self.running(variant), states[None])[0].float()

    def log_probabilities(self, variant: Variant, states: torch.Tensor) -> torch.Tensor:
        """What rows of `states` predict: (rows, vocabulary)."""
        return self.logits(variant, states).log_softmax(dim=-1)


def load_source(source: Source, placement: Placement) -> Any:
    """A model that was not converted, under transformers' own class."""
    with (
        private_source(source) as folder,
        refusing("the model cannot be loaded", source.folder, SourceError, folder),
    ):
        return load_folder(folder, source, placement, trust=False).eval()
