# Copyright the hybridize authors. Licensed under the Apache License, Version 2.0.
"""The model as vLLM runs it: the base model, in which vLLM puts its own attention.

That attention reads `config.layer_types` and `config.sliding_window` and nothing else of the mask,
so every mask but a bare window is refused here. Everything else loads the modeling files.
"""

from transformers import Qwen3Model as BaseModel

from .configuration_hybrid import HybridConfig


class HybridModel(BaseModel):
    """The base model, for vLLM alone."""

    config: HybridConfig

    def __init__(self, config: HybridConfig) -> None:
        mask, backend = config.hybrid["mask"], config._attn_implementation
        if backend != "vllm":
            raise ValueError(
                f"attention backend {backend!r} would not compute this model's mask {mask}: "
                "load it with AutoModelForCausalLM"
            )
        if mask["sink_tokens"] or mask["full_attention_decode"]:
            raise ValueError(
                f"vLLM cannot compute this model's mask {mask}: it knows windows, but neither "
                "sink tokens nor full attention in decode. Run it in transformers, or convert the "
                "original without --sinks and --full-decode"
            )
        super().__init__(config)
