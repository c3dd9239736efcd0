"""The table of architectures: a new one is one file and one line here."""

from __future__ import annotations

from converter.errors import FamilyError
from converter.families.base import Family
from converter.families.llama import LLAMA, MISTRAL
from converter.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (QWEN3, QWEN2, LLAMA, MISTRAL)
}

__all__ = ["FAMILIES", "Family", "family_of"]


def family_of(model_type: object, where: object) -> Family:
    """The family of a config's `model_type`.

    Raises:
        FamilyError: it is not in the table.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise FamilyError(
            "this architecture is not supported",
            where=where,
            expected="model_type " + ", ".join(FAMILIES),
            got=repr(model_type),
        )
    return family
