"""Which llama.cpp architecture computes a hybrid, and how a stock model is written under it.

Under the names `qwen3`, `qwen2` and `llama`, stock llama.cpp ignores window keys. Others, the
windowed architectures, compute the same function and honour a window per layer, with a small cache;
the table below says which, and what they want. It rests on the graphs of llama.cpp (src/models/)
and on the tests, which compare logits with the Hugging Face hybrid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from converter.common.errors import PlanError, SourceError, refusing
from converter.engines.gguf.writer import GgufModel, Tensor, constant, interleaved
from converter.model.families.stock_gguf import (
    Config,
    Keys,
    StockGguf,
    Value,
    array,
    integer,
    number_of,
    real,
    rotary_parameters,
)
from converter.model.mask import SLIDING, Mask
from converter.model.source import Source
from converter.plan.plan import Plan

# Whether an architecture rotates neighbouring rows (NORM) or halves of a head (NEOX).
ROTATES_NEIGHBOURS = {
    **dict.fromkeys(("llama", "granite", "smollm3", "granite_swa"), True),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3moe", "olmo2", "step35", "mellum"), False),
}
ROPE_FACTORS = "rope_freqs.weight"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_OTHER_ENGINE = "run it in another engine; hybridize inspect SOURCE says which honour it"
_PLAIN_WINDOW = (
    "leave out --sinks and --full-decode, measuring again under that mask (--target llama.cpp "
    "makes sure beforehand), or run the checkpoint in transformers"
)
# What to do instead of plans in which KV heads of one layer attend differently.
WHOLE_LAYERS = (
    "plan whole layers (leave out --granularity kv-head), or run the checkpoint in transformers"
)
# A learned logit of such a size adds exp(-1e30) = 0 to every softmax: no sink at all.
_NO_SINK = -1e30


@dataclass(frozen=True)
class WindowedArch:
    """An architecture that honours a window per layer.

    Attributes:
        keys: what it wants beside the stock architecture's keys, from those.
        unable: why it cannot compute a particular model, from its keys and tensor names.
        needs_output: whether a tied embedding must be stored twice.
        has_sinks: whether it wants sink logits in every layer.
    """

    arch: str
    keys: Callable[[Keys], dict[str, Value]]
    unable: Callable[[Keys, Collection[str]], str | None]
    needs_output: bool = True
    has_sinks: bool = False


def _head_dim(keys: Keys) -> int:
    heads = number_of(keys, "attention.head_count") or 1
    computed = (number_of(keys, "embedding_length") or 0) // heads
    return number_of(keys, "attention.key_length", computed) or 0


def _theta(keys: Keys) -> Value:
    return keys.get("rope.freq_base") or real(10000.0)


def _plain_rotary_only(keys: Keys, tensors: Collection[str]) -> str | None:
    kind = keys["rope.scaling.type"].value if "rope.scaling.type" in keys else "none"
    if kind == "none" and ("rope.scaling.factor" in keys or "rope.scale_linear" in keys):
        kind = "linear"
    elif kind == "none" and ROPE_FACTORS in tensors:
        kind = "llama3"
    if kind == "none":
        return None
    return f"llama.cpp scales ({kind}) only the full layers' rotary embedding there"


def _whole_heads(keys: Keys, _tensors: Collection[str]) -> str | None:
    if number_of(keys, "rope.dimension_count", _head_dim(keys)) != _head_dim(keys):
        return "only a part of each head is rotated"
    if number_of(keys, "expert_count", 0):
        return "experts in it have not been checked"
    return None


def _even_heads(keys: Keys, tensors: Collection[str]) -> str | None:
    heads = number_of(keys, "attention.head_count") or 1
    if _head_dim(keys) * heads != number_of(keys, "embedding_length"):
        return "llama.cpp computes it for heads of hidden size / number of heads only"
    return _plain_rotary_only(keys, tensors)


def _both_theta(keys: Keys) -> dict[str, Value]:
    return {"rope.freq_base": _theta(keys), "rope.freq_base_swa": _theta(keys)}


def _step35_keys(keys: Keys) -> dict[str, Value]:
    """Its loader halves the rotary dimensions of full layers, and asks for experts' width."""
    head_dim = integer(_head_dim(keys))
    return {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": integer(2 * _head_dim(keys)),
        "rope.dimension_count_swa": head_dim,
        **_both_theta(keys),
        "expert_feed_forward_length": keys["feed_forward_length"],
    }


def _granite_swa_keys(keys: Keys) -> dict[str, Value]:
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    wanted = dict.fromkeys(sizes, integer(_head_dim(keys)))
    wanted |= {"rope.freq_base": _theta(keys), "logit_scale": real(1.0)}
    return {name: keys.get(name, value) for name, value in wanted.items()}


def _smollm3_keys(keys: Keys) -> dict[str, Value]:
    """llama.cpp's own SmolLM3 leaves the rotary embedding out of every fourth layer."""
    layers = number_of(keys, "block_count") or 0
    every_fourth = array("bool", [(layer + 1) % 4 != 0 for layer in range(layers)])
    name = "attention.rope_pattern"
    return {**_granite_swa_keys(keys), name: keys.get(name, every_fourth)}


_STEP35 = WindowedArch("step35", _step35_keys, _plain_rotary_only)
_GRANITE_SWA = WindowedArch(
    "granite_swa", _granite_swa_keys, _whole_heads, needs_output=False, has_sinks=True
)
_MELLUM = WindowedArch("mellum", _both_theta, _plain_rotary_only)
_OLMO2 = WindowedArch("olmo2", _both_theta, _even_heads)

# What stock llama.cpp calls a model -> what computes its hybrids, the first that can.
WINDOWED_ARCHS: dict[str, tuple[WindowedArch, ...]] = {
    "qwen3": (_STEP35,),
    "qwen2": (_STEP35, _GRANITE_SWA),
    "llama": (_GRANITE_SWA,),
    "granite": (_GRANITE_SWA,),
    "smollm3": (replace(_GRANITE_SWA, keys=_smollm3_keys),),
    "qwen3moe": (_MELLUM,),
    "olmo2": (_OLMO2,),
}
WINDOWED_NAMES = {arch.arch for archs in WINDOWED_ARCHS.values() for arch in archs}


def stock_form(source: Source, where: object) -> StockGguf:
    """What stock llama.cpp calls a source.

    Raises:
        PlanError: llama.cpp does not have this family, or not in this variant.
    """
    stock = source.family.stock_gguf
    if stock is None:
        title = source.family.title
        raise cannot_honour(f"hybridize knows no llama.cpp architecture for {title}", where)
    if reason := stock.why_not(source.config):
        raise cannot_honour(reason, where)
    return stock


def extra_tensors(config: Config) -> tuple[str, ...]:
    """Names of the tensors that the stock form has and the source has not."""
    return (ROPE_FACTORS,) if rotary_parameters(config)["rope_type"] == "llama3" else ()


def windowed_arch(source: Source, mask: Mask, where: object, *, by_heads: bool = False) -> str:
    """The architecture that computes hybrids of a source, told from its configuration alone.

    With `by_heads` for plans in which KV heads of one layer attend differently.

    Raises:
        PlanError: there is no such architecture for this model, this mask or such plans.
        SourceError: a value of the configuration is of another type than any.
    """
    check_whole_layers(where, by_heads=by_heads)
    config = source.config
    with refusing("the model's configuration cannot be used", source.folder, SourceError):
        stock = stock_form(source, where)
        keys = stock.metadata(config, source.shape)
        return _windowed_arch(stock.arch, keys, extra_tensors(config), mask, where).arch


def check_whole_layers(where: object, *, by_heads: bool) -> None:
    """Refuse, with a PlanError, plans in which KV heads of one layer attend differently."""
    if by_heads:
        lacks = "all KV heads of a layer have one mask and one cache in llama.cpp"
        raise cannot_honour(lacks, where, WHOLE_LAYERS)


def _windowed_arch(
    arch: str, keys: Keys, tensors: Collection[str], mask: Mask, where: object
) -> WindowedArch:
    candidates = WINDOWED_ARCHS.get(arch, ())
    reasons = {candidate: candidate.unable(keys, tensors) for candidate in candidates}
    able = [candidate for candidate, reason in reasons.items() if reason is None]
    if not able:
        unknown = f"no llama.cpp architecture is known to honour a hybrid of {arch!r}"
        told = "; ".join(f"{candidate.arch}: {reason}" for candidate, reason in reasons.items())
        raise cannot_honour(told or unknown, where)
    if mask.sink_tokens:
        lacks = "llama.cpp cannot keep the first tokens in sliding layers"
        raise cannot_honour(lacks, where, _PLAIN_WINDOW)
    if mask.full_attention_decode:
        lacks = "llama.cpp cannot let generated tokens see more than the prompt did"
        raise cannot_honour(lacks, where, _PLAIN_WINDOW)
    return able[0]


def to_windowed_arch(stock: GgufModel, plan: Plan, where: object) -> GgufModel:
    """The model under an architecture that honours the plan.

    A plan without sliding layers is the stock model: an all-zero pattern aborts llama.cpp.

    Raises:
        PlanError: there is no such architecture for this model or this mask.
    """
    if SLIDING not in plan.layer_types:
        return stock
    present = [tensor.name for tensor in stock.tensors]
    found = _windowed_arch(stock.arch, stock.keys, present, plan.mask, where)
    tensors = list(stock.tensors)
    if ROTATES_NEIGHBOURS[found.arch] != ROTATES_NEIGHBOURS[stock.arch]:
        tensors = [_reordered(tensor, stock.keys, where) for tensor in tensors]
    names = {tensor.name: tensor for tensor in tensors}
    if found.needs_output and "output.weight" not in names:
        tensors.append(replace(names["token_embd.weight"], name="output.weight"))
    if found.has_sinks:
        # A sink logit for each head of each layer that adds nothing to its softmax.
        sinks = [_NO_SINK] * (number_of(stock.keys, "attention.head_count") or 0)
        for layer in range(len(plan.layer_types)):
            tensors.append(constant(f"blk.{layer}.attn_sinks.weight", sinks))
    keys = {**stock.keys, **found.keys(stock.keys), **window_keys(plan)}
    return replace(stock, arch=found.arch, keys=keys, tensors=tuple(tensors))


def window_keys(plan: Plan) -> dict[str, Value]:
    """The plan as llama.cpp spells it; its window counts the current token, as ours does."""
    return {
        WINDOW: integer(plan.mask.window_tokens),
        PATTERN: array("bool", [kind == SLIDING for kind in plan.layer_types]),
    }


def cannot_honour(reason: str, where: object, next_step: str = _OTHER_ENGINE) -> PlanError:
    """The refusal of a plan, with a way out."""
    return PlanError(
        "llama.cpp cannot honour this plan", where=where, got=reason, next_step=next_step
    )


def _reordered(tensor: Tensor, keys: Keys, where: object) -> Tensor:
    """Queries and keys, rotated by halves in the stock model, for an architecture of neighbours."""
    suffix = tensor.name.split(".", 2)[-1]
    if suffix.startswith("attn_qkv."):
        raise cannot_honour("queries, keys and values are stored in one tensor", where)
    if suffix.split(".")[0] in ("attn_q", "attn_k"):
        return interleaved(tensor, _head_dim(keys))
    return tensor
