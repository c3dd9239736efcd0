"""What a GGUF says about itself: name, licence, origin, and our own keys."""

from __future__ import annotations

import json

from converter import __version__
from converter.checkpoint.writer import carried_files
from converter.model.families.gguf_values import Value, flag, integer, text
from converter.model.source import Source
from converter.plan.plan import Plan

# llama.cpp's numbers of file types (include/llama.h, llama_ftype): those we write, and those that
# its quantiser makes.
WRITTEN = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
QUANTISED = {
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_0": 2,
    "q4_1": 3,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_0": 8,
    "q5_1": 9,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
}
_QUANTISATION_VERSION = 2
PLAN, HONOURED = "hybridize.plan", "hybridize.honoured"

# How a licence file begins, in lower case and without punctuation, and its SPDX name.
_LICENCES = (("apache license version 20", "apache-2.0"), ("mit license", "mit"))


def general_keys(source: Source, file_type: str) -> dict[str, Value]:
    """Name, licence, origin and type of an exported checkpoint."""
    name = source.name.rsplit("/", 1)[-1]
    keys = {
        "general.type": text("model"),
        "general.name": text(f"{name} hybrid"),
        "general.file_type": integer(WRITTEN[file_type]),
        "general.quantization_version": integer(_QUANTISATION_VERSION),
        "general.base_model.count": integer(1),
        "general.base_model.0.name": text(name),
    }
    if "/" in source.name:
        keys["general.base_model.0.repo_url"] = text(f"https://huggingface.co/{source.name}")
    return keys | _licence_keys(source)


def own_keys(plan: Plan, source_arch: str, *, honoured: bool) -> dict[str, Value]:
    """The plan and where the file comes from, for us to read back."""
    keys = {
        "hybridize.version": text(__version__),
        PLAN: text(json.dumps(plan.to_json(), ensure_ascii=False)),
        "hybridize.mask": text(str(plan.mask)),
        "hybridize.source": text(plan.source),
        "hybridize.source_arch": text(source_arch),
        HONOURED: flag(honoured),
    }
    if plan.revision is not None:
        keys["hybridize.source_revision"] = text(plan.revision)
    return keys


def _licence_keys(source: Source) -> dict[str, Value]:
    """The licence that a checkpoint carries as a file, recognised by its first words."""
    for name in carried_files(source):
        if not name.startswith("LICENSE"):
            continue
        words = (source.folder / name).read_text(encoding="utf-8", errors="replace").split()
        beginning = " ".join(words[:12]).lower()
        plain = "".join(letter for letter in beginning if letter.isalnum() or letter == " ")
        for start, spdx in _LICENCES:
            if plain.startswith(start):
                return {"general.license": text(spdx)}
        return {"general.license": text("other"), "general.license.name": text(name)}
    return {}
