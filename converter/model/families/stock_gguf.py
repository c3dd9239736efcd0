"""What llama.cpp calls the parts of a family: the form that its own converter writes.

Nothing here computes a plan; `converter.engines.gguf.architecture` gives the form another
architecture, which does. Key and tensor names are those of llama.cpp's loaders
(src/llama-arch.cpp), types of values those of the GGUF format (ggml-org/ggml docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from converter.model.dimensions import ModelDimensions

Config = Mapping[str, Any]
# Shapes of one layer's tensors, outermost dimension first, by the ends of their names.
Shapes = dict[str, tuple[int, ...]]

_MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# One layer's tensors by their suffix in safetensors; an asterisk stands for the expert.
LLAMA_NAMES: dict[str, str] = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    **{f"{a}.{kind}": f"{b}.{kind}" for a, b in _MATRICES.items() for kind in ("weight", "bias")},
}
EXPERT_NAMES: dict[str, str] = {
    **LLAMA_NAMES,
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.*.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.*.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.*.down_proj.weight": "ffn_down_exps.weight",
}
OLMO2_NAMES: dict[str, str] = {
    **LLAMA_NAMES,
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
# Rotary embeddings that llama.cpp computes as transformers does, and the numbers they need.
_ROTARY_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Rotary settings of transformers' YaRN that llama.cpp computes the same way.
_YARN_KEYS = {
    *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
    *("rope_type", "type", "rope_theta"),
}


@dataclass(frozen=True)
class Value:
    """A metadata value and its GGUF type (`uint32`, `string`); `item`: that of an array's items."""

    kind: str
    value: Any
    item: str | None = None


Keys = Mapping[str, Value]


# Values of the types that llama.cpp reads.
integer, real = partial(Value, "uint32"), partial(Value, "float32")
text, flag = partial(Value, "string"), partial(Value, "bool")


def array(item: str, values: Iterable[Any]) -> Value:
    """An array of items of one type."""
    return Value("array", list(values), item)


def number_of(keys: Keys, name: str, default: int | None = None) -> int | None:
    """A whole number among keys, or the default when it is absent or something else."""
    found = keys.get(name)
    return found.value if found is not None and type(found.value) is int else default


@dataclass(frozen=True)
class StockGguf:
    """A family in llama.cpp.

    Attributes:
        arch: the architecture that its own converter writes.
        names: GGUF names of one layer's tensors, by their suffix in safetensors.
        epsilon: of the norms, where the config does not say.
        keys: further metadata, by name without the architecture's prefix.
        unable: why a particular source cannot be expressed, or None when it can.
    """

    arch: str
    names: Mapping[str, str]
    epsilon: float = 1e-6
    keys: Callable[[Config, ModelDimensions], dict[str, Value]] = field(
        default=lambda _config, _shape: {}
    )
    unable: Callable[[Config], str | None] = field(default=lambda _config: None)

    def why_not(self, config: Config) -> str | None:
        """Why llama.cpp cannot compute this source at all, or None when it can."""
        if config.get("hidden_act", "silu") != "silu":
            return f"its activation is {config['hidden_act']}, and llama.cpp's is silu"
        if not _is_number(config.get("rms_norm_eps", self.epsilon)):
            return f"its rms_norm_eps is {config['rms_norm_eps']!r}"
        return _rotary_problem(config) or self.unable(config)

    def metadata(self, config: Config, shape: ModelDimensions) -> dict[str, Value]:
        """The architecture's keys, without its prefix."""
        return {
            "block_count": integer(shape.layers),
            "context_length": integer(shape.context_tokens),
            "embedding_length": integer(shape.hidden),
            "feed_forward_length": integer(shape.intermediate),
            "attention.head_count": integer(shape.heads),
            "attention.head_count_kv": integer(shape.kv_heads),
            "attention.key_length": integer(shape.head_dim),
            "attention.value_length": integer(shape.head_dim),
            "attention.layer_norm_rms_epsilon": real(config.get("rms_norm_eps", self.epsilon)),
            "rope.dimension_count": integer(shape.head_dim),
            "vocab_size": integer(shape.vocabulary),
            **_rotary_keys(config, shape),
            **self.keys(config, shape),
        }


def rotary_parameters(config: Config) -> dict[str, Any]:
    """A config's rotary settings, wherever it keeps them; `rope_type` and `rope_theta` included."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta") or config.get("rope_theta", 10000.0)
    return {**found, "rope_type": kind, "rope_theta": theta}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rotary_problem(config: Config) -> str | None:
    parameters = rotary_parameters(config)
    kind = parameters["rope_type"]
    if not isinstance(kind, str) or kind not in _ROTARY_NUMBERS:
        return f"its rotary embedding is of type {kind!r}, which llama.cpp computes otherwise"
    for name in ("rope_theta", *_ROTARY_NUMBERS[kind]):
        if not _is_number(parameters.get(name)):
            return f"its rotary embedding has no usable {name} ({parameters.get(name)!r})"
    if config.get("partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        return "only a part of each head is rotated (partial_rotary_factor)"
    extra = sorted(
        key for key in parameters.keys() - _YARN_KEYS if parameters[key] not in (None, 1.0)
    )
    if kind == "yarn" and (extra or parameters.get("truncate") is False):
        return f"its YaRN has settings that llama.cpp lacks ({', '.join(extra) or 'truncate'})"
    return None


def _rotary_keys(config: Config, shape: ModelDimensions) -> dict[str, Value]:
    parameters = rotary_parameters(config)
    keys = {"rope.freq_base": real(float(parameters["rope_theta"]))}
    kind = parameters["rope_type"]
    if kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = text(kind)
        keys["rope.scaling.factor"] = real(float(parameters["factor"]))
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings") or shape.context_tokens
        keys["rope.scaling.original_context_length"] = integer(original)
        for name in ("beta_fast", "beta_slow"):
            if parameters.get(name) is not None:
                keys[f"rope.scaling.yarn_{name}"] = real(float(parameters[name]))
    return keys


def expert_count(config: Config) -> int:
    """How many experts a layer has; the key goes by the family, and by who wrote the config."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    told = next((config[key] for key in keys if config.get(key)), None)
    return told if isinstance(told, int) and not isinstance(told, bool) else 0


def expert_keys(config: Config, _shape: ModelDimensions) -> dict[str, Value]:
    """How many experts there are, how many work, and how wide they are."""
    return {
        "expert_count": integer(expert_count(config)),
        "expert_used_count": integer(config.get("num_experts_per_tok", 8)),
        "expert_feed_forward_length": integer(config["moe_intermediate_size"]),
    }


def granite_keys(config: Config, _shape: ModelDimensions) -> dict[str, Value]:
    """Granite's multipliers, which llama.cpp calls scales."""
    names = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    return {name: real(float(config.get(key, 1.0))) for name, key in names.items()}


def smollm3_keys(config: Config, shape: ModelDimensions) -> dict[str, Value]:
    """Which layers rotate; SmolLM3 leaves the rotary embedding out of every fourth."""
    rotates = config.get("no_rope_layers")
    interval = config.get("no_rope_layer_interval", 4)
    if rotates is None:
        rotates = [int((layer + 1) % interval != 0) for layer in range(shape.layers)]
    return {"attention.rope_pattern": array("bool", [bool(layer) for layer in rotates])}
