"""A card's metadata block, and the licence that a source states in its own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from converter.publish.metadata import (
    LARGEST_CARD_BYTES,
    is_hub_id,
    licence_of,
    read_metadata,
    with_metadata,
    write_metadata,
)

BASE, UNNAMED = "https://huggingface.co/owner/name", "the-original-model-licence"


def card(folder: Path, metadata: str, *files: str) -> Path:
    (folder / "README.md").write_text(f"---\n{metadata}---\n\n# A model\n", encoding="utf-8")
    for name in files:
        (folder / name).write_text("Some licence.\n")
    return folder


@pytest.mark.parametrize(
    ("metadata", "files", "expected"),
    [
        ("license: apache-2.0\n", (), {"license": "apache-2.0"}),
        ("license: [mit, apache-2.0]\n", (), {"license": ["mit", "apache-2.0"]}),
        (
            "license: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n",
            ("LICENSE",),
            {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
        ),
        (
            "license: llama3.1\nlicense_link: TERMS.md\n",
            (),
            {"license": "llama3.1", "license_link": f"{BASE}/blob/main/TERMS.md"},
        ),
        (
            "license: other\nlicense_link: https://example.org/terms\n",
            (),
            {"license": "other", "license_link": "https://example.org/terms"},
        ),
        (
            "tags: [x]\n",
            ("LICENSE.txt",),
            {"license": "other", "license_name": UNNAMED, "license_link": "LICENSE.txt"},
        ),
    ],
)
def test_a_licence_is_inherited(
    metadata: str, files: tuple[str, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = licence_of(card(tmp_path, metadata, *files), "owner/name")
    assert found == expected
    # What is written is what the Hub's own reader finds.
    assert ModelCard(write_metadata(expected)).data.to_dict() == expected


BOMB = [f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]" for b, c in pairwise("abcdefghi")]


@pytest.mark.parametrize(
    "metadata",
    [
        "tags: [x]\n",
        "license:\n",
        "license: 3\n",
        "license: 'a b'\n",
        'license: "mit\\nevil: yes"\n',
        "license: {a: b}\n",
        "license: [mit, 3]\n",
        "license: []\n",
        "license: !!python/object/apply:os.system ['true']\n",
        "license: [mit\n",
        "- license\n",
        # A bomb, and a card that is too long to be parsed.
        "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *BOMB, "license: *i", ""]),
        "license: mit\n" + "x: y\n" * (LARGEST_CARD_BYTES // 4),
    ],
    ids=range(13),
)
def test_a_licence_that_is_none_is_not_believed(metadata: str, tmp_path: Path) -> None:
    assert licence_of(card(tmp_path, metadata)) == {}


@pytest.mark.parametrize("link", ["../../etc/passwd", "javascript:alert(1)", "http://x", "a b"])
def test_a_link_that_leads_elsewhere_is_left_out(link: str, tmp_path: Path) -> None:
    found = licence_of(card(tmp_path, f"license: other\nlicense_link: {link!r}\n"), "owner/name")
    assert found == {"license": "other"}


@given(st.text(max_size=300))
def test_any_text_has_metadata_or_none(text: str) -> None:
    assert isinstance(read_metadata(text), dict)
    assert isinstance(read_metadata(f"---\n{text}\n---\n"), dict)


VALUES = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), VALUES, max_size=4), VALUES)
def test_metadata_survives_being_written(metadata: dict[str, str], body: str) -> None:
    text = with_metadata(body, metadata)
    assert read_metadata(text) == {**read_metadata(body), **metadata}
    again = with_metadata(text, {"license": "mit"})
    assert read_metadata(again)["license"] == "mit"


def test_what_is_a_hub_id_and_what_is_none() -> None:
    assert all(map(is_hub_id, ["a/b", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B"]))
    others = ["", "a", "a/b/c", "/a", "a/", "a/..", "a--b/c", "é/b", "a b/c", "a/b\n"]
    assert not [name for name in others if is_hub_id(name)]
