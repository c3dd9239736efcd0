"""What the tool knows about one architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.model.dimensions import ModelDimensions
from converter.model.families.stock_gguf import StockGguf
from converter.model.mask import SLIDING, Mask

Config = Mapping[str, Any]


@dataclass(frozen=True)
class NativeForm:
    """How transformers' own code can be made to compute a plan for a family.

    Attributes:
        model_type: the type that the converted config.json names.
        base_class: prefix of the transformers classes that compute it (`Qwen3` of
            `Qwen3ForCausalLM`).
        architecture: what the converted config.json lists under `architectures`.
        edit: turns the source's config into that type's, without the plan's own keys.
        unable: why a particular source cannot take this form, or None when it can.
    """

    model_type: str
    base_class: str
    architecture: str
    edit: Callable[[Config, ModelDimensions], dict[str, Any]]
    unable: Callable[[Config], str | None] = field(default=lambda _config: None)


@dataclass(frozen=True)
class Family:
    """One architecture: how its checkpoints are checked and how its config is edited.

    Attributes:
        model_type: what the source's config.json names.
        title: the name people know it by.
        base_class: prefix of its transformers classes.
        native: the form in which transformers' own code computes a plain-window plan, if any.
        custom_edit: what the modeling file needs in the config beside the plan's own keys.
        layer_tensors: shapes of one layer's tensors by suffix, for the check before converting.
        refuse: why a particular source cannot be converted, or None when it can.
        tied_by_default: whether embeddings are tied when the config does not say.
        load_exactly: options of `from_pretrained` without which the model cannot run in float64.
        pack_layer: turns one layer's tensors, by suffix, into the parameters of its class, where
            transformers stores them in another way than checkpoints do.
        stock_gguf: what llama.cpp calls its parts; None when it has not been tried.
        mlx_module: the module of mlx-lm whose layers the checkpoint's mlx_hybrid.py builds on;
            None where it was not tried.
    """

    model_type: str
    title: str
    base_class: str
    native: NativeForm | None
    custom_edit: Mapping[str, Any]
    layer_tensors: Callable[[Config, ModelDimensions], dict[str, tuple[int, ...]]]
    refuse: Callable[[Config], str | None]
    tied_by_default: bool = False
    load_exactly: Mapping[str, Any] = field(default_factory=dict)
    pack_layer: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda tensors: tensors)
    stock_gguf: StockGguf | None = None
    mlx_module: str | None = None

    def why_not_native(self, config: Config, mask: Mask) -> str | None:
        """Why transformers' own code cannot compute a plan under `mask`, or None when it can."""
        if self.native is None:
            return f"transformers' {self.title} code does not slide by layer"
        if not mask.is_plain_window:
            return f"no native code computes this mask ({mask})"
        return self.native.unable(config)

    def is_tied(self, config: Config) -> bool:
        """Whether the output head is the embedding."""
        return bool(config.get("tie_word_embeddings", self.tied_by_default))

    def expected_tensors(
        self, config: Config, shape: ModelDimensions
    ) -> dict[str, tuple[int, ...]]:
        """Every tensor that the source must hold, with its shape."""
        expected = {
            "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
            "model.norm.weight": (shape.hidden,),
        }
        if not self.is_tied(config):
            expected["lm_head.weight"] = (shape.vocabulary, shape.hidden)
        per_layer = self.layer_tensors(config, shape)
        for layer in range(shape.layers):
            for suffix, size in per_layer.items():
                expected[f"model.layers.{layer}.{suffix}"] = size
        return expected


def llama_like_tensors(
    shape: ModelDimensions, *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """One layer of the layout that Llama began and the first families share."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
        "self_attn.q_proj.weight": (query, shape.hidden),
        "self_attn.k_proj.weight": (key, shape.hidden),
        "self_attn.v_proj.weight": (key, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, query),
        "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
    }
    if qkv_bias:
        tensors |= {
            "self_attn.q_proj.bias": (query,),
            "self_attn.k_proj.bias": (key,),
            "self_attn.v_proj.bias": (key,),
        }
    if o_bias:
        tensors["self_attn.o_proj.bias"] = (shape.hidden,)
    if mlp_bias:
        tensors |= {
            "mlp.gate_proj.bias": (shape.intermediate,),
            "mlp.up_proj.bias": (shape.intermediate,),
            "mlp.down_proj.bias": (shape.hidden,),
        }
    return tensors


def already_slides(config: Config) -> str | None:
    """Why a source that already has sliding layers is refused, or None.

    A window as long as the context hides nothing, so it counts as full attention.
    """
    if SLIDING in (config.get("layer_types") or ()):
        return "its layer_types already contain sliding_attention"
    window = config.get("sliding_window")
    active = config.get("use_sliding_window", True)
    if window is not None and active and window < config["max_position_embeddings"]:
        return f"it already attends through a window of {window} tokens (sliding_window)"
    return None


def rope_theta_and_scaling(config: Config) -> dict[str, Any]:
    """A config's rotary settings under the keys that every engine reads.

    transformers v5 writes `rope_parameters` only, from which mlx-lm reads no theta at all; the
    older `rope_theta` and `rope_scaling` are understood everywhere.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else parameters}
