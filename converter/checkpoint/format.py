"""What a plan looks like in a checkpoint: its config.json and its Python files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter import __version__
from converter.common.resources import resource_dir
from converter.model.dimensions import ModelDimensions
from converter.model.mask import FULL, OWN_SLIDING, SLIDING, Mask, is_mixed
from converter.plan.plan import Plan

if TYPE_CHECKING:
    from converter.model.source import Source

# Of the `hybrid` object in config.json.
FORMAT_VERSION = 1

CARD_FILE = Path("README.md")
PLAN_FILE = Path("hybrid") / "plan.json"
SCORES_FILE = Path("hybrid") / "scores.json"
QUALITY_FILE = Path("hybrid") / "quality.json"
CURVE_FILE = Path("hybrid") / "curve.json"
MANIFEST_FILE = Path("hybrid") / "manifest.json"
SOURCE_CONFIG = Path("hybrid") / "source_config.json"
MODELING_FILE = "modeling_hybrid.py"
# What it computes with, the same in every checkpoint.
ATTENTION_FILE = "attention_hybrid.py"
# Beside it where the mask is more than a plain window.
MASKS_FILE = "modeling_masks.py"
# Beside these where KV heads of one layer attend differently.
HEADS_FILE = "modeling_heads.py"
CONFIGURATION_FILE = "configuration_hybrid.py"
MLX_FILE = "mlx_hybrid.py"
VLLM_FILE = "vllm_hybrid.py"
# The first release of transformers that runs our own code; its files look at it first.
CODE_SINCE = "5.4"
# Native types whose plan mlx-lm's own code computes.
_MLX_NATIVE = ("mistral", "smollm3")
# transformers warns of a wrong tokenizer regex, falsely, when a mistral config names a version
# before 5 or none (transformers tokenization_utils_tokenizers.py).
_OLDEST_VERSION = "5.0.0"
# The lines of the modeling template that name the family.
_CONFIG_LINE = "from transformers import Qwen3Config as HybridConfig"
_MLX_LINE = "from mlx_lm.models import qwen3 as base"
_MODEL_LINE = "from transformers import Qwen3ForCausalLM as BaseForCausalLM"
_VLLM_LINE = "from transformers import Qwen3Model as BaseModel"


@dataclass(frozen=True)
class CheckpointFormat:
    """How a checkpoint spells its plan.

    Attributes:
        native: whether transformers' own code computes the plan.
        base_class: prefix of the transformers classes that the modeling file builds on.
        config_class: the transformers class of the configuration.
        since: the first release of transformers that computes it.
        why_not_native: None for the native form.
        modeling_files: where the model's class is, and the files that it builds on below it.
        mlx_module: what the mlx_hybrid.py of the checkpoint builds on; None when it has none,
            because mlx-lm needs none or cannot compute the plan.
        vllm: whether the checkpoint has a vllm_hybrid.py.
        multimodal: whether the model takes more than text.
    """

    native: bool
    model_type: str
    base_class: str
    config_class: str
    since: str
    why_not_native: str | None
    modeling_files: tuple[str, ...]
    mlx_module: str | None = None
    vllm: bool = False
    multimodal: bool = False

    @property
    def model_class(self) -> str:
        """The transformers class that computes the model, by the plan or without it."""
        return self.base_class + ("ForConditionalGeneration" if self.multimodal else "ForCausalLM")


def format_of(source: Source, mask: Mask, *, by_heads: bool = False) -> CheckpointFormat:
    """The form for a source under a mask: native only where native code computes exactly it.

    With `by_heads` for plans in which KV heads of one layer attend differently.
    """
    family = source.family
    reason = "no native code parts the KV heads of a layer" if by_heads else None
    reason = reason or family.why_not_native(source.config, mask)
    # mlx-lm cannot tell generated tokens from the prompt's.
    mlx = None if mask.full_attention_decode or by_heads else family.mlx_module
    if reason is None and family.native is not None:
        native = family.native
        mlx = None if native.model_type in _MLX_NATIVE else mlx
        base = native.base_class
        config_class = f"{base}Config"
        files: tuple[str, ...] = (MODELING_FILE,)
        return CheckpointFormat(
            True, native.model_type, base, config_class, native.since, None, files, mlx
        )
    custom_type = f"hybrid_{family.model_type}"
    files = (MODELING_FILE,) if mask.is_plain_window else (MASKS_FILE, MODELING_FILE)
    files = (HEADS_FILE, *files) if by_heads else files
    base, vllm = family.base_class, not (family.not_in_vllm or by_heads)
    config_class = family.config_class or f"{base}Config"
    return CheckpointFormat(
        *(False, custom_type, base, config_class, CODE_SINCE, reason, files, mlx, vllm),
        multimodal=bool(family.inside),
    )


def format_of_plan(source: Source, plan: Plan) -> CheckpointFormat:
    """The form of a plan's checkpoint."""
    return format_of(source, plan.mask, by_heads=plan.is_mixed)


def config_layer_types(shape: ModelDimensions, layer_types: Sequence[str]) -> list[str]:
    """What a checkpoint's config.json says under `layer_types`.

    The plan, unless some of the model's layers do not attend fully: then its class reads more than
    the mask from there, and the plan stands in the `hybrid` object. So it does where KV heads of a
    layer attend differently, for which transformers has no word: that layer is called full.
    """
    if not shape.kinds:
        return [FULL if is_mixed(kind) else kind for kind in layer_types]
    return [SLIDING if kind == OWN_SLIDING else kind for kind in shape.kinds]


def render_config(source: Source, plan: Plan) -> dict[str, Any]:
    """The checkpoint's config.json: the source's, edited as JSON.

    The round trip of transformers' configuration classes would drop keys that other engines need
    (`rope_theta`).
    """
    form, family = format_of_plan(source, plan), source.family
    config = source.native_config
    model_class = f"{form.modeling_files[0].removesuffix('.py')}.HybridForCausalLM"
    # A multimodal model goes on from text alone, too.
    auto_map = dict.fromkeys(("AutoModelForCausalLM", family.auto_class), model_class)
    added = family.added_keys(source.config)
    if form.native and family.native is not None:
        config = {**family.native.edit(config, source.shape), **added}
        config["architectures"] = [family.native.architecture]
    else:
        config |= added
        config["architectures"] = ["HybridForCausalLM"]
        auto_map["AutoConfig"] = f"{CONFIGURATION_FILE.removesuffix('.py')}.HybridConfig"
        if form.vllm:
            auto_map["AutoModel"] = f"{VLLM_FILE.removesuffix('.py')}.HybridModel"
    written_by = str(config.get("transformers_version"))
    major = written_by.split(".")[0]
    if form.mlx_module is not None:
        config["model_file"] = MLX_FILE
    of_plan, shape = plan.to_json(), source.shape
    apart = shape.kinds or plan.is_mixed
    same = ("mask", "method", "budget", "ranking", "profiles", "source")
    config = family.with_language(
        config | {"model_type": form.model_type, "auto_map": auto_map},
        layer_types=config_layer_types(shape, plan.layer_types),
        **({} if shape.kinds else {"sliding_window": plan.mask.window_tokens}),
    )
    return config | {
        "transformers_version": written_by
        if major.isdigit() and int(major) >= 5
        else _OLDEST_VERSION,
        "hybrid": {
            "format_version": FORMAT_VERSION,
            **({"layer_types": of_plan["layer_types"]} if apart else {}),
            **{key: of_plan[key] for key in same},
            "source_revision": plan.revision,
            "tool_version": __version__,
        },
    }


def render_code(form: CheckpointFormat) -> dict[str, str]:
    """The Python files of a checkpoint, by name.

    The templates are working files for Qwen3; rendering swaps the base class, nothing else.
    """
    swaps: dict[str, dict[str, str]] = {
        MODELING_FILE: {
            _CONFIG_LINE: _CONFIG_LINE.replace("Qwen3Config", form.config_class)
            if form.native
            else "from .configuration_hybrid import HybridConfig",
            _MODEL_LINE: _MODEL_LINE.replace("Qwen3ForCausalLM", form.model_class),
        },
        ATTENTION_FILE: {},
    }
    for file, below in pairwise(form.modeling_files):
        module, ours = (name.removesuffix(".py") for name in (below, MODELING_FILE))
        # Of the file below, what this one adds to.
        swaps[file] = {
            f"from .{ours} import {name} as": f"from .{module} import {name} as"
            for name in ("NAME", "HybridForCausalLM", "hybrid_attention")
        }
    *above, _ = form.modeling_files
    if not form.native:
        swaps[CONFIGURATION_FILE] = {
            "import Qwen3Config as": f"import {form.config_class} as",
            '"hybrid_qwen3"': f'"{form.model_type}"',
            # transformers tells classes of models apart by that of their configuration.
            f"read by {MODELING_FILE}": f"read by {', '.join(above or (MODELING_FILE,))}",
        }
    if form.vllm:
        swaps[VLLM_FILE] = {_VLLM_LINE: _VLLM_LINE.replace("Qwen3", form.base_class)}
    if form.mlx_module is not None:
        swaps[MLX_FILE] = {_MLX_LINE: _MLX_LINE.replace("qwen3", form.mlx_module)}
    files = {}
    for name, lines in swaps.items():
        text = (resource_dir("templates") / name).read_text(encoding="utf-8")
        for line, replacement in lines.items():
            text = text.replace(line, replacement)
        files[name] = text
    return files
