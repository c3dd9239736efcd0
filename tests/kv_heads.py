"""Plans of KV heads, and checkpoints that are written by them."""

from __future__ import annotations

from pathlib import Path

from converter.checkpoint.writer import fill
from converter.model.mask import FULL, OWN_SLIDING, SLIDING, Mask
from converter.model.source import open_source
from converter.plan.plan import Plan
from tests.conftest import EVERY_FAMILY, LAYERS, make_model
from tests.hybrids import MASKS, SINKS, WINDOW

KV_HEADS = 4
# Layers that are wholly one kind, and mixtures with heads before, after and between the others.
KINDS = ("mixed_attention:1,3", SLIDING, "mixed_attention:0", FULL)
# Of each layer, how many KV heads attend fully.
FULL_HEADS = (2, 0, 1, 4)


def mask_of(name: str, window: int = WINDOW) -> Mask:
    """One of the masks that tests of checkpoints know by name."""
    full_decode = bool(MASKS[name].get("full_decode"))
    return Mask(window, SINKS if "sinks" in MASKS[name] else 0, full_decode)


def kinds_in(family: str) -> tuple[str, ...]:
    """Kinds for a test model of a family, whose layers have 2 KV heads; some no plan changes."""
    mine = iter(("mixed_attention:1", SLIDING, "mixed_attention:0", FULL))
    config = EVERY_FAMILY[family]
    own = config.get("text_config", config).get("layer_types", [FULL] * LAYERS)
    stay = {SLIDING: OWN_SLIDING}
    return tuple(next(mine) if kind == FULL else stay.get(kind, kind) for kind in own)


def grouped_model(folder: Path, family: str = "qwen3") -> Path:
    """A model of 4 KV heads, which 8 query heads share."""
    return make_model(folder, family, num_attention_heads=8, num_key_value_heads=KV_HEADS)


def checkpoint_by_heads(
    source: Path, out: Path, mask: Mask, kinds: tuple[str, ...] = KINDS
) -> Path:
    """A checkpoint of a source."""
    plan = Plan(kinds, mask, "by hand", None, None, source.name, None)
    out.mkdir()
    fill(open_source(str(source)), plan, out, {}, None, copy=False)
    return out
