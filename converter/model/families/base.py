"""What the tool knows about one architecture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from converter.model.dimensions import ModelDimensions, read_shape
from converter.model.families.experts import working_experts
from converter.model.families.stock_gguf import Config, Shapes, StockGguf, expert_count
from converter.model.mask import SLIDING, Mask

# The architecture under which vLLM runs transformers' code with its own attention, for families of
# which its own code does not read layer_types. transformers itself goes by the model type.
TRANSFORMERS_BACKEND = "TransformersForCausalLM"


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


def unlike_kinds(config: Config, kinds: Sequence[str], known: Collection[str]) -> str | None:
    """Why layers of these kinds are refused that are not all of the known ones, or None."""
    if len(kinds) != config["num_hidden_layers"]:
        return f"its layer_types name {len(kinds)} layers"
    unknown = [kind for kind in kinds if kind not in known]
    return f"its layer_types contain {unknown[0]!r}" if unknown else None


@dataclass(frozen=True)
class NativeForm:
    """How transformers' own code can be made to compute a plan for a family.

    Attributes:
        model_type: the type that the converted config.json names.
        base_class: prefix of the transformers classes that compute it (`Qwen3` of
            `Qwen3ForCausalLM`).
        architecture: what the converted config.json lists under `architectures`.
        since: the first release of transformers whose code computes it.
        unable: why a particular source cannot take this form, or None when it can.
        edit: turns the source's config into that type's, without the plan's own keys.
    """

    model_type: str
    base_class: str
    architecture: str
    since: str
    unable: Callable[[Config], str | None] = field(default=lambda _config: None)
    edit: Callable[[Config, ModelDimensions], dict[str, Any]] = field(
        default=lambda config, _shape: dict(config)
    )


@dataclass(frozen=True)
class Family:
    """One architecture: how its checkpoints are checked and how its config is edited.

    Attributes:
        model_type: what the source's config.json names.
        base_class: prefix of its transformers classes.
        config_class: the one of its configuration, where that has another prefix.
        layer_tensors: shapes of a layer's tensors by suffix, for the check before converting; of
            the layer with this index.
        native: the form in which transformers' own code computes a plain-window plan, if any.
        other_layers: what the model's layers are, and what those that no plan changes keep: fields
            of `ModelDimensions`; empty where all attend fully.
        per_layer: keys of the configuration, beside `layer_types`, that name single layers.
        added_keys: what the plan needs in the config beside its own keys.
        refuse: why a particular source cannot be converted, or None when it can.
        tied_by_default: whether embeddings are tied when the config does not say.
        load_exactly: options of `from_pretrained` without which the model cannot run in float64.
        pack_layer: turns one layer's tensors, by suffix, into the parameters of its class, where
            transformers stores them in another way than checkpoints do.
        stored_packed: shapes of a layer's tensors in the files of models that are published with
            their experts packed already, from the others'; None where none are.
        float32_tensors: ends of the names of tensors that transformers never holds in less.
        stock_gguf: what llama.cpp calls its parts; None when it has not been tried.
        mlx_module: the module of mlx-lm whose layers the checkpoint's mlx_hybrid.py builds on;
            None where it was not tried.
        not_in_vllm: why vLLM does not run the custom form through its transformers backend; empty
            where it was run there.
        inside: the key of config.json under which a multimodal model has its language model's
            configuration, which all of the above is about; empty where the model is one itself.
        prefix: what the names of the language model's tensors begin with, but for its head's.
    """

    model_type: str
    title: str
    base_class: str
    layer_tensors: Callable[[Config, ModelDimensions, int], Shapes]
    native: NativeForm | None = None
    other_layers: Callable[[Config, ModelDimensions], dict[str, Any]] = field(
        default=lambda _config, _shape: {}
    )
    per_layer: Callable[[Config, ModelDimensions], dict[str, Any]] = field(
        default=lambda _config, _shape: {}
    )
    added_keys: Callable[[Config], Mapping[str, Any]] = field(default=lambda _config: {})
    refuse: Callable[[Config], str | None] = already_slides
    tied_by_default: bool = False
    load_exactly: Mapping[str, Any] = field(default_factory=dict)
    pack_layer: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda tensors: tensors)
    stored_packed: Callable[[Shapes], Shapes] | None = None
    float32_tensors: tuple[str, ...] = ()
    stock_gguf: StockGguf | None = None
    mlx_module: str | None = None
    not_in_vllm: str = ""
    config_class: str = ""
    inside: str = ""
    prefix: str = "model."

    @property
    def auto_class(self) -> str:
        """The class by which transformers loads a whole model of it."""
        return "AutoModelForImageTextToText" if self.inside else "AutoModelForCausalLM"

    @property
    def layers(self) -> str:
        """What the names of all layers' tensors begin with; the layer's number follows."""
        return f"{self.prefix}layers."

    def language(self, config: Config) -> Config:
        """The language model's configuration, from the whole model's."""
        if not self.inside:
            return config
        # transformers reads these from the whole.
        shared = {key: config[key] for key in ("dtype", "torch_dtype") if config.get(key)}
        tied = {"tie_word_embeddings": self.is_tied(config)}
        return shared | dict(config[self.inside]) | tied

    def with_language(self, config: Config, **changes: Any) -> dict[str, Any]:
        """A whole model's configuration with changes in its language model's."""
        if not self.inside:
            return {**config, **changes}
        return {**config, self.inside: {**config[self.inside], **changes}}

    def dimensions(self, config: Config, where: object) -> ModelDimensions:
        """The sizes of a model of this family.

        Raises:
            SourceError: one is missing, or makes no sense.
        """
        language = self.language(config)
        shape = read_shape(language, where)
        return replace(shape, **self.other_layers(language, shape))

    def why_not_native(self, config: Config, mask: Mask) -> str | None:
        """Why transformers' own code cannot compute a plan under `mask`, or None when it can."""
        if self.native is None:
            return f"transformers' {self.title} code cannot slide layers and change nothing else"
        if not mask.is_plain_window:
            return f"no native code computes this mask ({mask})"
        return self.native.unable(config)

    def is_tied(self, config: Config) -> bool:
        """Whether the output head is the embedding."""
        return bool(config.get("tie_word_embeddings", self.tied_by_default))

    def weights_per_token(self, config: Config, shape: ModelDimensions) -> float:
        """Matrix elements of the layers that a token is multiplied with, of experts' its share."""
        config = self.language(config)
        share = working_experts(config) / (expert_count(config) or 1)
        return sum(
            prod(size) * (share if "experts." in name and "shared_" not in name else 1)
            for layer in range(shape.layers)
            for name, size in self.layer_tensors(config, shape, layer).items()
            if len(size) > 1
        )

    def stored_layer(
        self, config: Config, shape: ModelDimensions, layer: int, *, packed: bool = False
    ) -> Shapes:
        """Shapes of a layer's tensors by suffix, in files with packed experts or without."""
        tensors = self.layer_tensors(self.language(config), shape, layer)
        return self.stored_packed(tensors) if packed and self.stored_packed else tensors

    def expected_tensors(
        self, config: Config, shape: ModelDimensions, *, packed: bool = False
    ) -> Shapes:
        """Every tensor that the source must hold, with its shape."""
        expected = {
            f"{self.prefix}embed_tokens.weight": (shape.vocabulary, shape.hidden),
            f"{self.prefix}norm.weight": (shape.hidden,),
        }
        if not self.is_tied(config):
            expected["lm_head.weight"] = (shape.vocabulary, shape.hidden)
        return expected | {
            f"{self.layers}{layer}.{suffix}": size
            for layer in range(shape.layers)
            for suffix, size in self.stored_layer(config, shape, layer, packed=packed).items()
        }


def llama_like_tensors(
    shape: ModelDimensions, *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False
) -> Shapes:
    """One layer of the layout that Llama began and the first families share."""
    hidden, width = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = {
        "self_attn.q_proj": (query, hidden, qkv_bias),
        "self_attn.k_proj": (key, hidden, qkv_bias),
        "self_attn.v_proj": (key, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, query, o_bias),
        "mlp.gate_proj": (width, hidden, mlp_bias),
        "mlp.up_proj": (width, hidden, mlp_bias),
        "mlp.down_proj": (hidden, width, mlp_bias),
    }
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"{name}.weight": (rows, columns) for name, (rows, columns, _) in matrices.items()},
        **{f"{name}.bias": (rows,) for name, (rows, _, bias) in matrices.items() if bias},
    }


def plain_tensors(_config: Config, shape: ModelDimensions, _layer: int) -> Shapes:
    """Llama's layout without biases."""
    return llama_like_tensors(shape)


def tensors_with_biases(config: Config, shape: ModelDimensions, _layer: int) -> Shapes:
    """Llama's layout, with the biases that the config asks for."""
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return llama_like_tensors(shape, qkv_bias=attention, o_bias=attention, mlp_bias=mlp)


def head_norms(shape: ModelDimensions) -> Shapes:
    """Norms over each head's queries and keys."""
    return {f"self_attn.{part}_norm.weight": (shape.head_dim,) for part in "qk"}


def without(tensors: Shapes, part: str) -> Shapes:
    """The tensors but for those of a part of the layer."""
    return {name: size for name, size in tensors.items() if part not in name}


def rope_theta_and_scaling(config: Config) -> dict[str, Any]:
    """A config's rotary settings under the keys that every engine reads.

    transformers v5 writes `rope_parameters` only, from which mlx-lm reads no theta at all; the
    older `rope_theta` and `rope_scaling` are understood everywhere.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else parameters}
