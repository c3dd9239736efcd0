"""`hybridize inspect`: what a model is and what a hybrid of it would be."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from converter.cli.grouping import command
from converter.cli.options import MASK, MODEL, Common, common_options, settings_options
from converter.common.errors import PlanError
from converter.model.mask import FULL, LINEAR, OWN_SLIDING

if TYPE_CHECKING:
    from converter.model.dimensions import ModelDimensions
    from converter.model.mask import Mask
    from converter.model.source import Source

_BUDGETS = ("1/8", "1/4", "1/2")


@command()
@click.argument("source", type=MODEL)
@settings_options("revision", *MASK)
@common_options(recipe=False)
def inspect(common: Common, source: str, **options: Any) -> None:
    """Say what SOURCE is and what a hybrid of it would be.

    Engines that would honour it, KV bytes by budget. SOURCE is a model folder or a Hub id.
    """
    from converter.checkpoint.format import format_of
    from converter.common.units import human_bytes
    from converter.engines.support import verdicts
    from converter.model.source import open_source

    settings = common.settings(options)
    opened = open_source(source, revision=settings.revision, offline=common.offline)
    mask = settings.mask(opened.shape)
    form = format_of(opened, mask)
    shape = opened.shape
    engines = verdicts(opened, mask)
    by_heads = verdicts(opened, mask, by_heads=True) if shape.kv_heads > 1 else ()
    costs = _costs(shape, mask)
    spelled = asdict(form)
    mlx_module = spelled.pop("mlx_module")
    spelled |= {"gguf": _gguf_form(opened, mask), "mlx_module": mlx_module}
    value = {
        "source": opened.name,
        "revision": opened.revision,
        "family": opened.family.title,
        "model_type": opened.family.model_type,
        "shape": asdict(shape),
        "weight_bytes": opened.weights.tensor_bytes,
        "mask": mask.to_json(),
        "form": spelled,
        "engines": [asdict(verdict) for verdict in engines],
        "engines_by_kv_head": [asdict(verdict) for verdict in by_heads],
        "kv_bytes": costs,
    }

    def show() -> None:
        console = common.console
        console.print(
            f"{opened.name}: {opened.family.title}, {_layers_told(shape)}, hidden {shape.hidden}, "
            f"{shape.heads} heads ({shape.kv_heads} key/value) of {shape.head_dim}, "
            f"context {shape.context_tokens:,}, weights {human_bytes(opened.weights.tensor_bytes)}"
        )
        console.print(f"a hybrid with {mask}:")
        console.table(("engine", "", "note"), [(v.engine, v.word, v.note) for v in engines])
        if by_heads:
            able = ", ".join(v.engine for v in by_heads if v.word != "refused")
            console.print(f"engines that run a hybrid by KV heads: {able}")
        console.print(f"KV cache of one sequence of {shape.context_tokens:,} tokens")
        rows = [
            [cost["budget"], human_bytes(cost["hybrid"]), f"{cost['share']:.0%}"] for cost in costs
        ]
        columns = ["full layers", "KV cache", "of the original"]
        if mask.is_bare and not shape.kinds:
            columns += ["in vLLM", "better there"]
            for row, cost in zip(rows, costs, strict=True):
                better = " or ".join(map(str, cost["vllm"]["better"]))
                row += [human_bytes(cost["vllm"]["bytes"]), better]
        console.table(columns, rows)

    common.console.result(value, show)


def _layers_told(shape: ModelDimensions) -> str:
    """How many layers there are, and of which kinds, where they are of several."""
    counted = Counter(shape.layer_kinds)
    words = {FULL: "full", LINEAR: "recurrent", OWN_SLIDING: f"of {shape.own_window_tokens} tokens"}
    told = ", ".join(f"{count} {words[kind]}" for kind, count in counted.items())
    return f"{shape.layers} layers" + (f" ({told})" if shape.kinds else "")


def _gguf_form(source: Source, mask: Mask) -> dict[str, str | None]:
    """What a GGUF of a hybrid would be: its architecture, or why there is none."""
    from converter.engines.gguf.architecture import windowed_arch

    try:
        return {"arch": windowed_arch(source, mask, None), "why_not": None, "way_out": None}
    except PlanError as error:
        got, way_out = error.details["got"], error.details["next step"]
        return {"arch": None, "why_not": str(got), "way_out": str(way_out)}


def _costs(shape: ModelDimensions, mask: Mask) -> list[dict[str, Any]]:
    """KV bytes at the model's context, for each of the usual budgets and for the original."""
    from converter.engines.vllm import vllm_cache
    from converter.plan.budget import parse_budget
    from converter.plan.plan import cache_bytes
    from converter.plan.units import Units

    tokens, layers = shape.context_tokens, Units(len(shape.full_layers))
    counts = {text: parse_budget(text).count(layers, shape, mask) for text in _BUDGETS}
    labels = {f"{count} ({text})": count for text, count in counts.items()}
    full = cache_bytes(len(shape.full_layers), mask, shape, tokens)
    costs = []
    for label, count in {**labels, "all": len(shape.full_layers)}.items():
        hybrid = cache_bytes(count, mask, shape, tokens)
        costs.append(
            {
                "budget": label,
                "full": full,
                "hybrid": hybrid,
                "context_tokens": tokens,
                "share": hybrid / full,
                # Other masks, and models that have other layers too, vLLM does not run.
                "vllm": asdict(vllm_cache(count, mask, shape, tokens))
                if mask.is_bare and not shape.kinds
                else None,
            }
        )
    return costs
