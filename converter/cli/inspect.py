"""`hybridize inspect`: what a model is and what a hybrid of it would be."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from converter.cli.options import MASK, Common, common_options, settings_options

_BUDGETS = ("1/8", "1/4", "1/2")


@click.command()
@click.argument("source")
@settings_options("revision", *MASK)
@common_options(recipe=False)
def inspect(common: Common, source: str, **options: Any) -> None:
    """What SOURCE is, which engines would honour a hybrid of it, and KV bytes by budget.

    SOURCE is a model folder or a Hub id.
    """
    from converter.console import human_bytes
    from converter.cost import expected_cost
    from converter.decide import choose_mask
    from converter.engines import verdicts
    from converter.form import form_of
    from converter.source import open_source

    settings = common.settings(options)
    opened = open_source(source, revision=settings.revision, offline=common.offline)
    mask = choose_mask(settings, opened.shape)
    form = form_of(opened, mask)
    shape = opened.shape
    engines = verdicts(form)
    costs = _costs(opened, mask)
    expected = expected_cost(opened.config, opened.family, shape, settings)
    value = {
        "source": opened.name,
        "revision": opened.revision,
        "family": opened.family.title,
        "model_type": opened.family.model_type,
        "shape": asdict(shape),
        "weight_bytes": opened.weights.tensor_bytes,
        "mask": mask.to_json(),
        "form": asdict(form),
        "engines": [asdict(verdict) for verdict in engines],
        "kv_bytes": costs,
        "expected": asdict(expected),
    }

    def show() -> None:
        console = common.console
        console.print(
            f"{opened.name}: {opened.family.title}, {shape.layers} layers, hidden {shape.hidden}, "
            f"{shape.heads} heads ({shape.kv_heads} key/value) of {shape.head_dim}, "
            f"context {shape.context_tokens:,}, weights {human_bytes(opened.weights.tensor_bytes)}"
        )
        console.print(f"a hybrid with {mask}:")
        console.table(("engine", "", "note"), [(v.engine, v.word, v.note) for v in engines])
        console.print(f"KV cache of one sequence of {shape.context_tokens:,} tokens")
        console.table(
            ("full layers", "KV cache", "of the original"),
            [
                (cost["budget"], human_bytes(cost["hybrid"]), f"{cost['share']:.0%}")
                for cost in costs
            ],
        )
        console.print(f"expected, not measured: {expected.sentences()[1]}")

    common.console.result(value, show)


def _costs(source: Any, mask: Any) -> list[dict[str, Any]]:
    """KV bytes at the model's context, for each of the usual budgets and for the original."""
    from converter.budget import parse_budget
    from converter.plan import Plan, kv_bytes, layer_types_of

    total = source.shape.layers
    costs = []
    for text in (*_BUDGETS, "all"):
        count = total if text == "all" else parse_budget(text).layers(total)
        kinds = layer_types_of(range(count), total)
        plan = Plan(kinds, mask, "count", text, None, source.name, source.revision)
        cost = kv_bytes(plan, source.shape, source.shape.context_tokens)
        label = "all" if text == "all" else f"{count} ({text})"
        costs.append({"budget": label, **cost, "share": cost["hybrid"] / cost["full"]})
    return costs
