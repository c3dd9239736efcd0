"""A checkpoint's tokenizer as GGUF metadata.

llama.cpp carries the splitting rules of byte-level BPE tokenizers in its code, and a GGUF names
them. The standard way to find the name is to encode one fixed text and look its hash up
(`pre_tokenizers.toml`). A vocabulary that nobody has seen has no known hash; then the splitting
rule in tokenizer.json itself decides, where it is a known one to the letter.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from converter.common.errors import SourceError, refusing
from converter.common.files import read_json_object
from converter.engines.gguf.sentencepiece import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    is_llama_form,
    read_llama_form,
    read_model_file,
)
from converter.model.families.stock_gguf import Value, array, flag, integer, text
from converter.model.source import Source

_PREFIX = "tokenizer.ggml"
# llama.cpp's names of special tokens, by transformers' in tokenizer_config.json.
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_KNOWN = tomllib.loads(Path(__file__).with_name("pre_tokenizers.toml").read_text(encoding="utf-8"))
PROBE: str = _KNOWN["probe"]
_NFC = {"type": "NFC"}


def tokenizer_keys(source: Source) -> dict[str, Value]:
    """The metadata of a source's tokenizer: vocabulary, merges, special tokens, chat template.

    tokenizer.json is what transformers runs, so it goes before tokenizer.model.

    Raises:
        SourceError: there is none, or llama.cpp would not tokenize like it.
    """
    folder, rows = source.folder, source.shape.vocabulary
    path, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    settings = _optional(folder / "tokenizer_config.json")
    if path.is_file():
        contents = read_json_object(path, SourceError)
        _check_json(contents, path)
        added = {int(token["id"]): token for token in contents.get("added_tokens", [])}
        if is_llama_form(contents):
            try:
                keys = _sentencepiece_keys(read_llama_form(contents, path), added, rows, path)
            except SourceError:
                if not model_file.is_file():
                    raise
                keys = _sentencepiece_keys(read_model_file(model_file), added, rows, model_file)
        else:
            keys = _bpe_keys(contents, added, rows, path)
        keys |= _added_around(path, contents)
    elif model_file.is_file():
        added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
        keys = _sentencepiece_keys(read_model_file(model_file), added, rows, model_file)
        for name, default in (("add_bos_token", True), ("add_eos_token", False)):
            keys[f"{_PREFIX}.{name}"] = flag(bool(settings.get(name, default)))
    else:
        raise SourceError(
            "there is no tokenizer that can be exported",
            where=folder,
            expected="tokenizer.json or tokenizer.model",
            next_step="save one there with transformers' AutoTokenizer and save_pretrained",
        )
    return keys | _special_keys(source, settings, keys) | _template_keys(folder, settings)


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path, SourceError) if path.is_file() else {}


def _check_json(contents: Mapping[str, Any], path: Path) -> None:
    told = contents.get("model")
    model = told if isinstance(told, dict) else {}
    if not (isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)):
        raise SourceError(
            "this kind of tokenizer cannot be exported",
            where=path,
            expected="BPE with a vocabulary and merges",
            got=repr(model.get("type")) if isinstance(told, dict) else "no model",
        )


def load_fast(path: Path) -> Any:
    """The tokenizer in a tokenizer.json, by the tokenizers library.

    Raises:
        SourceError: it cannot make sense of the file.
    """
    from tokenizers import Tokenizer

    with refusing("the tokenizer cannot be loaded", path, SourceError):
        return Tokenizer.from_file(str(path))


def pre_tokenizer(probe_ids: Sequence[int], tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the splitting rule of a byte-level tokenizer.json, or None.

    Args:
        probe_ids: token ids of `PROBE`, special tokens included.
    """
    digest = hashlib.sha256(str(list(probe_ids)).encode()).hexdigest()
    if name := _KNOWN["by_hash"].get(digest):
        return str(name)
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
    rule = (steps[0].get("pattern") or {}).get("Regex", "")
    return next((name for name, known in _KNOWN["by_rule"].items() if known == rule), None)


def _bpe_keys(
    contents: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], rows: int, path: Path
) -> dict[str, Value]:
    """A byte-level BPE vocabulary, which llama.cpp calls `gpt2`."""
    name = pre_tokenizer(load_fast(path).encode(PROBE).ids, contents)
    if name is None:
        raise SourceError(
            "llama.cpp is not known to split texts as this tokenizer does",
            where=path,
            expected="a pre-tokenizer that llama.cpp has a name for",
            got=f"{(contents.get('pre_tokenizer') or {}).get('type')!r}, of an unknown hash",
            next_step="export the model with llama.cpp's own converter and add the plan with: "
            "hybridize export --from-gguf STOCK.gguf --plan OUT/hybrid/plan.json FILE.gguf",
        )
    if not contents["model"]["merges"]:
        raise SourceError(
            "llama.cpp does not load a byte-level tokenizer without merges", where=path
        )
    model = contents["model"]
    tokens, kinds = _filled(model["vocab"], added, rows, path)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        f"{_PREFIX}.model": text("gpt2"),
        f"{_PREFIX}.pre": text(name),
        f"{_PREFIX}.tokens": array("string", tokens),
        f"{_PREFIX}.token_type": array("int32", kinds),
        f"{_PREFIX}.merges": array("string", merges),
    }


def _filled(
    vocabulary: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], rows: int, path: Path
) -> tuple[list[str], list[int]]:
    """Texts and kinds of all rows of the embedding."""
    by_id = {index: (token, NORMAL) for token, index in vocabulary.items()}
    for index, token in added.items():
        by_id[index] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    if max(by_id) >= rows:
        raise SourceError(
            "the tokenizer has more tokens than the model",
            where=path,
            expected=f"{rows} tokens (vocab_size)",
            got=max(by_id) + 1,
        )
    filled = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(rows)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _sentencepiece_keys(
    vocabulary: Vocabulary, added: Mapping[int, Mapping[str, Any]], rows: int, path: Path
) -> dict[str, Value]:
    """A SentencePiece vocabulary, which llama.cpp calls `llama`."""
    known = {index: {"content": token} for index, token in enumerate(vocabulary.texts)}
    tokens, kinds = _filled({}, {**known, **added}, rows, path)
    for index, kind in enumerate(vocabulary.kinds):
        # What the vocabulary itself says goes before what was added with the same id, except that
        # an added token that is special is one that texts do not spell.
        if index not in added or kind != NORMAL:
            kinds[index] = kind
    scores = [*vocabulary.scores, *[0.0] * (rows - len(vocabulary.scores))]
    return {
        f"{_PREFIX}.model": text("llama"),
        f"{_PREFIX}.pre": text("default"),
        f"{_PREFIX}.tokens": array("string", tokens),
        f"{_PREFIX}.scores": array("float32", scores),
        f"{_PREFIX}.token_type": array("int32", kinds),
        f"{_PREFIX}.add_space_prefix": flag(vocabulary.adds_space),
    }


def _added_around(path: Path, contents: Mapping[str, Any]) -> dict[str, Value]:
    """Whether a text gets a first and a last token, as the tokenizer itself does it."""
    tokenizer = load_fast(path)
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, after = start, len(whole) - start - len(bare)
    if before > 1 or after > 1:
        raise SourceError(
            "llama.cpp adds at most one token before and after a text, and this tokenizer more",
            where=path,
            got=f"{before} before, {after} after ({contents.get('post_processor', {})})",
        )
    return {
        f"{_PREFIX}.add_bos_token": flag(before == 1),
        f"{_PREFIX}.add_eos_token": flag(after == 1),
    }


def _special_keys(
    source: Source, settings: Mapping[str, Any], keys: Mapping[str, Value]
) -> dict[str, Value]:
    """Ids of the special tokens: by the tokenizer's own settings, else by the model's."""
    tokens: list[str] = keys[f"{_PREFIX}.tokens"].value
    ids = {token: index for index, token in enumerate(tokens)}
    found: dict[str, int] = {}

    def usable(value: object) -> TypeGuard[int]:
        # Some configs name ids that no row of the embedding has.
        return isinstance(value, int) and 0 <= value < len(tokens)

    for name, ours in _SPECIAL.items():
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None and name not in settings:
            token_id = source.config.get(f"{name}_id")
            token_id = next(iter(token_id), None) if isinstance(token_id, list) else token_id
            if usable(token_id):
                found[ours] = token_id
        elif token in ids:
            found[ours] = ids[token]
    # transformers stops at any of these; llama.cpp has a second place beside the end of text.
    generation = {**source.config, **_optional(source.folder / "generation_config.json")}
    stops = generation.get("eos_token_id")
    for stop in stops if isinstance(stops, list) else [stops]:
        if usable(stop) and stop != found.get("eos_token_id"):
            found["eot_token_id"] = stop
            break
    return {f"{_PREFIX}.{name}": integer(token_id) for name, token_id in found.items()}


def _template_keys(folder: Path, settings: Mapping[str, Any]) -> dict[str, Value]:
    """Chat templates, from their own files or from the tokenizer's settings."""
    inline = settings.get("chat_template")
    templates: dict[str, str] = {"default": inline} if isinstance(inline, str) else {}
    if isinstance(inline, list):
        templates |= {entry["name"]: entry["template"] for entry in inline}
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if (own := folder / "chat_template.jinja").is_file():
        templates["default"] = own.read_text(encoding="utf-8")
    keys = {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text(template)
        for name, template in templates.items()
    }
    if others := sorted(templates.keys() - {"default"}):
        keys["tokenizer.chat_templates"] = array("string", others)
    return keys
