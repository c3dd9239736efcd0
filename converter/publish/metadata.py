"""The metadata block of a model card: read from anybody's, written into ours.

The block is YAML between two lines of `---` at the top of README.md, as the Hub reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Licence:
    """Under what a model may be used, as cards state it.

    Attributes:
        identifiers: `apache-2.0`, or `other`; rarely several.
        name: of a licence that the Hub has no identifier for.
        link: where its text is: a file of the folder, or an address.
    """

    identifiers: tuple[str, ...]
    name: str | None = None
    link: str | None = None

    def to_metadata(self) -> dict[str, Any]:
        """The keys of a card."""
        single = self.identifiers[0] if len(self.identifiers) == 1 else list(self.identifiers)
        return {
            "license": single,
            **({"license_name": self.name} if self.name else {}),
            **({"license_link": self.link} if self.link else {}),
        }


def read_metadata(text: str) -> dict[str, Any]:
    """The metadata of a card; empty when it has none or none that can be read."""
    import yaml

    found = _BLOCK.match(text)
    if found is None or len(text) > LARGEST_CARD_BYTES:
        return {}
    try:
        value = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_metadata(metadata: Mapping[str, Any]) -> str:
    """The block, with the lines around it. Values are quoted as YAML needs it."""
    import yaml

    body = yaml.safe_dump(
        dict(metadata), sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000
    )
    return f"---\n{body}---\n"


def with_metadata(text: str, changes: Mapping[str, Any]) -> str:
    """A card with some of its metadata changed; the rest of the text as it was."""
    found = _BLOCK.match(text)
    body = text[found.end() :] if found else text
    return write_metadata(read_metadata(text) | dict(changes)) + body


def licence_of(folder: Path, hub_id: str | None = None) -> Licence | None:
    """What a model folder says its licence is, or None when it says nothing usable.

    Args:
        folder: the model.
        hub_id: where it was downloaded from; a licence text that the checkpoint does not carry is
            linked there.
    """
    metadata = read_metadata(_read_card(folder))
    told = metadata.get("license")
    identifiers = tuple(told) if isinstance(told, list) else (told,)
    usable = all(isinstance(x, str) and _LICENCE_ID.fullmatch(x) for x in identifiers)
    if identifiers and usable:
        name = _short_text(metadata.get("license_name"))
        link = _short_text(metadata.get("license_link"))
        return Licence(tuple(map(str, identifiers)), name, _reachable(link, folder, hub_id))
    texts = sorted(path.name for path in folder.glob("LICENSE*") if path.is_file())
    if texts and _short_text(texts[0]):
        return Licence(("other",), "the-original-model-licence", texts[0])
    return None


def is_hub_id(name: str) -> bool:
    """Whether a name can be OWNER/NAME on the Hub."""
    return _HUB_ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def is_licence_id(text: str) -> bool:
    """Whether a text can be a licence's identifier."""
    return _LICENCE_ID.fullmatch(text) is not None


def _read_card(folder: Path) -> str:
    try:
        path = contained(folder, "README.md")
        if path.stat().st_size > LARGEST_CARD_BYTES:
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, SourceError):
        return ""


def _short_text(value: object) -> str | None:
    """A value that is one short line without control characters, else None."""
    if isinstance(value, str) and 0 < len(value) <= _LONGEST_TEXT and value.isprintable():
        return value
    return None


def _reachable(link: str | None, folder: Path, hub_id: str | None) -> str | None:
    """A link that works from the checkpoint, which carries only licence files of the source."""
    if link is None or link.startswith("https://"):
        return link
    carried = link.startswith("LICENSE") and "/" not in link and (folder / link).is_file()
    if carried or hub_id is None or not re.fullmatch(r"[\w.-]+", link):
        return link if carried else None
    return f"https://huggingface.co/{hub_id}/blob/main/{link}"
