"""A Hub on loopback that the real client talks to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopback_hub import TOKEN, LoopbackHub, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub, and a client that knows no other, has a token and an empty cache."""
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()
    huggingface_hub.utils.disable_progress_bars()
    with serving(tmp_path / "cas") as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        pages = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", pages)
        yield found
    huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()
