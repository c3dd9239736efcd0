"""Naming a byte-level BPE tokenizer's pre-tokenizer as llama.cpp knows it.

llama.cpp carries the splitting rules in its code and a GGUF names them (`tokenizer.ggml.pre`). The
standard way to find the name is to encode one fixed text and look its hash up; the text and
the hashes are those of llama.cpp's converter (conversion/base.py), facts that only work verbatim.
A vocabulary that nobody has seen has no known hash; then the splitting rule in tokenizer.json
itself decides, where it is one of those below to the letter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

_BY_HASH = {
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "a0b64b4385f123663873756336c085744376d015ff328bb1d901598f63c44152": "modern-bert",
}
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
# The one split before the bytes, as tokenizer.json spells it.
_BY_RULE = {
    _WORDS + "\\p{N}" + _REST: "qwen2",
    _WORDS + "\\p{N}{1,3}" + _REST: "llama-bpe",
}


def pre_tokenizer(probe_ids: Sequence[int], tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for a byte-level tokenizer's splitting rule, or None when it has none.

    Args:
        probe_ids: token ids of `PROBE`, special tokens included.
        tokenizer: the contents of tokenizer.json.
    """
    digest = hashlib.sha256(str(list(probe_ids)).encode()).hexdigest()
    return _BY_HASH.get(digest) or _by_rule(tokenizer)


def _by_rule(tokenizer: Mapping[str, Any]) -> str | None:
    # llama.cpp merges whole words of the vocabulary at once under some names and not others.
    if tokenizer["model"].get("ignore_merges") or tokenizer.get("normalizer") not in (None, _NFC):
        return None
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return "gpt-2"
    if len(steps) != 2 or last.get("use_regex", True) or steps[0].get("type") != "Split":
        return None
    if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        return None
    return _BY_RULE.get((steps[0].get("pattern") or {}).get("Regex", ""))


_NFC = {"type": "NFC"}
