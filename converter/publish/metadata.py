"""The metadata block of a model card: read from anybody's, written into ours.

huggingface_hub's `ModelCard` would cost every conversion half a second of imports, talks to stderr
about cards without metadata, and raises on keys that are no Python names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.common.errors import SourceError
from converter.model.weights import contained

# Cards are a few kilobytes; nothing longer than this is parsed.
LARGEST_CARD_BYTES = 1 << 20
_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$\r?\n?", re.DOTALL | re.MULTILINE)
# An identifier of the Hub's list, such as apache-2.0 or cc-by-nc-4.0.
_LICENCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_LONGEST_TEXT = 200


def read_metadata(text: str) -> dict[str, Any]:
    """The metadata of a card; empty when it has none or none that can be read."""
    import yaml

    block, _ = _split(text)
    try:
        value = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_metadata(metadata: Mapping[str, Any]) -> str:
    """The block, with the lines around it. Values are quoted as YAML needs it."""
    import yaml

    body = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{body}---\n"


def with_metadata(text: str, changes: Mapping[str, Any]) -> str:
    """A card with some of its metadata changed; the rest of the text as it was."""
    return write_metadata(read_metadata(text) | dict(changes)) + _split(text)[1]


def _split(text: str) -> tuple[str, str]:
    """The YAML of a card and the text below it."""
    found = _BLOCK.match(text) if len(text) <= LARGEST_CARD_BYTES else None
    return (found[1], text[found.end() :]) if found else ("", text)


def licence_of(folder: Path, hub_id: str | None = None) -> dict[str, Any]:
    """What a model folder says its licence is, as keys of a card; empty without anything usable.

    A licence text that the checkpoint does not carry is linked at `hub_id`, where it came from.
    """
    try:
        path = contained(folder, "README.md")
        small = path.stat().st_size <= LARGEST_CARD_BYTES
        card = path.read_text(encoding="utf-8") if small else ""
    except (OSError, UnicodeDecodeError, SourceError):
        card = ""
    metadata = read_metadata(card)
    told = metadata.get("license")
    identifiers = told if isinstance(told, list) else [told]
    if identifiers and all(isinstance(x, str) and _LICENCE_ID.fullmatch(x) for x in identifiers):
        found = {
            "license": identifiers[0] if len(identifiers) == 1 else identifiers,
            "license_name": _short_text(metadata.get("license_name")),
            "license_link": _reachable(_short_text(metadata.get("license_link")), folder, hub_id),
        }
        return {key: value for key, value in found.items() if value is not None}
    texts = sorted(path.name for path in folder.glob("LICENSE*") if path.is_file())
    if not texts or not _short_text(texts[0]):
        return {}
    name = "the-original-model-licence"
    return {"license": "other", "license_name": name, "license_link": texts[0]}


def is_hub_id(name: str) -> bool:
    """Whether a name can be OWNER/NAME on the Hub."""
    return _HUB_ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def is_licence_id(text: str) -> bool:
    """Whether a text can be a licence's identifier."""
    return _LICENCE_ID.fullmatch(text) is not None


def _short_text(value: object) -> str | None:
    """A value that is one short line without control characters, else None."""
    short = isinstance(value, str) and 0 < len(value) <= _LONGEST_TEXT and value.isprintable()
    return str(value) if short else None


def _reachable(link: str | None, folder: Path, hub_id: str | None) -> str | None:
    """A link that works from the checkpoint, which carries only licence files of the source."""
    if link is None or link.startswith("https://"):
        return link
    carried = link.startswith("LICENSE") and "/" not in link and (folder / link).is_file()
    if carried or hub_id is None or not re.fullmatch(r"[\w.-]+", link):
        return link if carried else None
    return f"https://huggingface.co/{hub_id}/blob/main/{link}"
