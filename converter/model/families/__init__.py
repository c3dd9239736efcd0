"""The table of architectures: a new one is one file and one line here."""

from __future__ import annotations

from converter.common.errors import FamilyError
from converter.model.families.base import Family
from converter.model.families.dense import (
    GEMMA,
    GRANITE,
    MINISTRAL3,
    OLMO2,
    PHI3,
    SEED_OSS,
    SMOLLM3,
)
from converter.model.families.gemma4 import GEMMA4
from converter.model.families.llama import LLAMA, MISTRAL
from converter.model.families.mixtures import GLM4_MOE, MINIMAX_M2
from converter.model.families.own_windows import EXAONE4, GEMMA3, OLMO3
from converter.model.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from converter.model.families.recurrent import (
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_5_MOE_VISION,
    QWEN3_5_VISION,
    QWEN3_NEXT,
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(QWEN3, QWEN2, LLAMA, MISTRAL, QWEN3_MOE, OLMO2, SMOLLM3, PHI3, GEMMA, GRANITE),
        *(SEED_OSS, MINISTRAL3, GLM4_MOE, MINIMAX_M2),
        *(QWEN3_5, QWEN3_5_MOE, QWEN3_5_VISION, QWEN3_5_MOE_VISION, QWEN3_NEXT),
        *(OLMO3, EXAONE4, GEMMA3, GEMMA4),
    )
}

# Types that people will try, and why they are not above.
REFUSED = {
    "gpt_oss": "each head's softmax has a learned term beside the keys (sinks), "
    "which hybridize's attention does not compute",
    "llama4_text": "its other layers attend within chunks, which hybridize does not compute",
    **dict.fromkeys(
        ("lfm2", "lfm2_moe", "lfm3"),
        "its other layers are convolutions, whose states hybridize cannot share between plans",
    ),
    "falcon_h1": "every layer has a state-space part beside its attention, "
    "whose states hybridize cannot share between plans",
    **dict.fromkeys(
        ("granitemoehybrid", "nemotron_h"),
        "its other layers are state-space ones (Mamba), whose states hybridize cannot share "
        "between plans",
    ),
}


def family_of(model_type: object, where: object) -> Family:
    """The family of a config's `model_type`.

    Raises:
        FamilyError: it is not in the table.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
        raise FamilyError(
            "this architecture is not supported" + (f": {reason}" if reason else ""),
            where=where,
            expected="model_type " + ", ".join(FAMILIES),
            got=repr(model_type),
        )
    return family
