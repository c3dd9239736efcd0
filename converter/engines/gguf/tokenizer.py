"""A checkpoint's tokenizer as GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converter.common.errors import SourceError
from converter.common.files import read_json_object
from converter.engines.gguf.pretokenizers import PROBE, pre_tokenizer
from converter.engines.gguf.sentencepiece import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Pieces,
    is_llama_form,
    read_llama_form,
    read_model_file,
)
from converter.model.families.gguf_values import Value, array, flag, integer, text
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


def tokenizer_keys(source: Source) -> dict[str, Value]:
    """The metadata of a source's tokenizer: vocabulary, merges, special tokens, chat template.

    tokenizer.json is what transformers runs, so it goes before tokenizer.model.

    Raises:
        SourceError: there is none, or llama.cpp would not tokenize like it.
    """
    folder, rows = source.folder, source.shape.vocabulary
    path = folder / "tokenizer.json"
    settings = _optional(folder / "tokenizer_config.json")
    if path.is_file():
        contents = read_json_object(path, SourceError)
        _check_json(contents, path)
        added = {int(token["id"]): token for token in contents.get("added_tokens", [])}
        model_file = folder / "tokenizer.model"
        if is_llama_form(contents):
            try:
                keys = _pieces_keys(read_llama_form(contents, path), added, rows, path)
            except SourceError:
                if not model_file.is_file():
                    raise
                keys = _pieces_keys(read_model_file(model_file), added, rows, model_file)
        else:
            keys = _bpe_keys(contents, added, rows, path)
        keys |= _added_around(path, contents)
    elif (folder / "tokenizer.model").is_file():
        path = folder / "tokenizer.model"
        added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
        keys = _pieces_keys(read_model_file(path), added, rows, path)
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
    model = contents.get("model")
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        raise SourceError(
            "this kind of tokenizer cannot be exported",
            where=path,
            expected="BPE with a vocabulary and merges",
            got=repr(model.get("type")) if isinstance(model, dict) else "no model",
        )


def load_fast(path: Path) -> Any:
    """The tokenizer in a tokenizer.json, by the tokenizers library.

    Raises:
        SourceError: it cannot make sense of the file.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises `Exception` itself.
        if type(error) is not Exception:
            raise
        raise SourceError("the tokenizer cannot be loaded", where=path, got=error) from error


def _bpe_keys(
    contents: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], rows: int, path: Path
) -> dict[str, Value]:
    """A byte-level BPE vocabulary, which llama.cpp calls `gpt2`."""
    probe = load_fast(path).encode(PROBE).ids
    name = pre_tokenizer(probe, contents)
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
    vocabulary: dict[str, int] = contents["model"]["vocab"]
    tokens, kinds = _filled(vocabulary, added, rows, path)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in contents["model"]["merges"]
    ]
    return {
        f"{_PREFIX}.model": text("gpt2"),
        f"{_PREFIX}.pre": text(name),
        f"{_PREFIX}.tokens": array("string", tokens),
        f"{_PREFIX}.token_type": array("int32", kinds),
        f"{_PREFIX}.merges": array("string", merges),
    }


def _filled(
    vocabulary: Mapping[str, int],
    added: Mapping[int, Mapping[str, Any]],
    rows: int,
    path: Path,
) -> tuple[list[str], list[int]]:
    """Texts and kinds of all rows of the embedding."""
    by_id = {index: (token, NORMAL) for token, index in vocabulary.items()}
    by_id |= {
        index: (token["content"], CONTROL if token.get("special") else USER_DEFINED)
        for index, token in added.items()
    }
    if max(by_id) >= rows:
        raise SourceError(
            "the tokenizer has more tokens than the model",
            where=path,
            expected=f"{rows} tokens (vocab_size)",
            got=max(by_id) + 1,
        )
    filled = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(rows)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _pieces_keys(
    pieces: Pieces, added: Mapping[int, Mapping[str, Any]], rows: int, path: Path
) -> dict[str, Value]:
    """A SentencePiece vocabulary, which llama.cpp calls `llama`."""
    tokens, kinds = _filled({}, {**_as_added(pieces), **added}, rows, path)
    for index, kind in enumerate(pieces.kinds):
        # What the vocabulary itself says goes before what was added with the same id, except that
        # an added token that is special is one that texts do not spell.
        if index not in added or kind != NORMAL:
            kinds[index] = kind
    scores = [*pieces.scores, *[0.0] * (rows - len(pieces.scores))]
    return {
        f"{_PREFIX}.model": text("llama"),
        f"{_PREFIX}.pre": text("default"),
        f"{_PREFIX}.tokens": array("string", tokens),
        f"{_PREFIX}.scores": array("float32", scores),
        f"{_PREFIX}.token_type": array("int32", kinds),
        f"{_PREFIX}.add_space_prefix": flag(pieces.adds_space),
    }


def _as_added(pieces: Pieces) -> dict[int, dict[str, Any]]:
    return {index: {"content": token} for index, token in enumerate(pieces.texts)}


def _added_around(path: Path, contents: Mapping[str, Any]) -> dict[str, Value]:
    """Whether a text gets a first and a last token, as the tokenizer itself does it."""
    tokenizer = load_fast(path)
    probe = "a"
    bare = tokenizer.encode(probe, add_special_tokens=False).ids
    whole = tokenizer.encode(probe).ids
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
    generation = _optional(source.folder / "generation_config.json")
    found: dict[str, Value] = {}
    for name, ours in _SPECIAL.items():
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None and name not in settings:
            token_id = source.config.get(f"{name}_id")
            if isinstance(token_id, list):
                token_id = token_id[0] if token_id else None
            # Some configs name ids that no row of the embedding has.
            if isinstance(token_id, int) and 0 <= token_id < len(tokens):
                found[f"{_PREFIX}.{ours}"] = integer(token_id)
        elif token in ids:
            found[f"{_PREFIX}.{ours}"] = integer(ids[token])
    # transformers stops at any of these; llama.cpp has a second place beside the end of text.
    stops = generation.get("eos_token_id", source.config.get("eos_token_id"))
    others = _others(stops, found.get(f"{_PREFIX}.eos_token_id"), len(tokens))
    if others:
        found[f"{_PREFIX}.eot_token_id"] = integer(others[0])
    return found


def _others(stops: object, end: Value | None, rows: int) -> list[int]:
    """Tokens that end an answer beside the end of text."""
    wanted: Sequence[object] = stops if isinstance(stops, list) else [stops]
    known = None if end is None else end.value
    return [i for i in wanted if isinstance(i, int) and i != known and 0 <= i < rows]


def _template_keys(folder: Path, settings: Mapping[str, Any]) -> dict[str, Value]:
    """Chat templates, from their own files or from the tokenizer's settings."""
    templates: dict[str, str] = {}
    inline = settings.get("chat_template")
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        templates |= {entry["name"]: entry["template"] for entry in inline}
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    keys = {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text(template)
        for name, template in templates.items()
    }
    others = sorted(name for name in templates if name != "default")
    if others:
        keys["tokenizer.chat_templates"] = array("string", others)
    return keys
