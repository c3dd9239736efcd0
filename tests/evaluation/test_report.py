"""The report: whole without a network, every figure in it, legible in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from converter.common.drawing import DARK, LIGHT, MARKS
from converter.evaluation.report import render_page

FIGURES = {
    *("layers", "tasks", "differences", "distance", "budget", "selectors"),
    *("kv-bytes", "prefill-flop", *(f"heat-0-{place}" for place in range(4))),
    *(f"heat-0-{place}-difference" for place in range(1, 4)),
}
SCHEMES = {"dark": 0, "light": 1}
# Text of figures and body against what is behind it (WCAG 2.1, AA for normal text).
LEAST_CONTRAST = 4.5

# A frame as wide as a screen: a window is never narrower than 500 pixels.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><pre id="probe"></pre>
<script>onmessage = (e) => {{ document.getElementById("probe").textContent = e.data; }};</script>
<iframe src="{name}" width="{width}" height="1200" style="border: 0"></iframe>
"""
# Appended to a copy of the page: what a reader would see, as data.
PROBE = Path(__file__).with_name("report_probe.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(evaluated: Path) -> str:
    return (evaluated / "report.html").read_text(encoding="utf-8")


def test_every_figure_is_there_and_nothing_comes_from_elsewhere(page: str) -> None:
    """No script, and no address but the names of the SVG standard."""
    assert set(re.findall(r'data-figure="([^"]+)"', page)) == FIGURES
    assert "<script" not in page
    outside = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(address.startswith(("#", "data:")) for address in outside)
    addresses = set(re.findall(r"https?://[^\"' <]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_page_is_well_formed(page: str) -> None:
    """Every element closed in order, and every id once."""
    empty = {"meta", "link", "br"}

    class Walker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.ids: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.ids += [value or "" for name, value in attrs if name == "id"]
            if tag not in empty:
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    walker = Walker()
    walker.feed(page)
    assert walker.open == []
    assert len(walker.ids) == len(set(walker.ids))


def test_every_colour_follows_the_theme(page: str) -> None:
    for mark in vars(MARKS).values():
        assert mark not in page
    figures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#000000", "#ffffff"}
    for name in vars(LIGHT):
        assert page.count(f"--{name}: ") == 2, name


def test_the_page_says_the_numbers(page: str, numbers: dict[str, Any]) -> None:
    text = html.unescape(re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    for finding in numbers["findings"]:
        assert finding in text
    for name, variant in numbers["variants"].items():
        assert f"<td>{name}</td>" in text
        share = "{accuracy:.3f} [{low:.3f}, {high:.3f}]".format(**variant["tasks"]["recall"])
        assert share in text
    assert numbers["provenance"]["fingerprint"] in text


def test_names_are_text_and_never_markup(numbers: dict[str, Any]) -> None:
    hostile = '<img src=x onerror="alert(1)">'
    changed = json.loads(json.dumps(numbers).replace("mine-rows", json.dumps(hostile)[1:-1]))
    page = render_page(changed | {"model": hostile}, None)
    assert "<img" not in page
    assert "&lt;img" in page


def test_a_report_with_little_in_it(numbers: dict[str, Any]) -> None:
    """Only the original, nothing asked: costs and provenance are left."""
    nothing = {"tasks": {}, "overall": None, "heatmaps": {}, "answers": None, "by_distance": []}
    original = numbers["variants"]["original"] | nothing | {"text": None, "speed": None}
    little = numbers | {"variants": {"original": original}, "tasks": {}, "perplexity": None}
    little |= {"kl": None, "source": None, "mask": None, "selectors": [], "findings": []}
    page = render_page(little | {"provenance": numbers["provenance"] | {"plan": None}}, None)
    assert set(re.findall(r'data-figure="([^"]+)"', page)) == {"kv-bytes", "prefill-flop"}
    assert "not converted" in page


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    return found


def luminance(colour: str) -> float:
    """Relative luminance of a CSS rgb() colour (WCAG 2.1)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [390, 1180], ids=["phone", "desk"])
def test_a_browser_shows_every_figure(
    scheme: str, width: int, browser: str, page: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(name=path.name, width=width), encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *("--enable-logging=stderr", "--hide-scrollbars", "--window-size=1300,1300"),
            "--virtual-time-budget=10000",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            *(f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert probe is not None
    seen = json.loads(html.unescape(probe[1]))
    palette = DARK if scheme == "dark" else LIGHT
    assert (seen["ink"], seen["paper"]) == (rgb(palette.ink), rgb(palette.paper))
    assert contrast(seen["ink"], seen["page"]) >= LEAST_CONTRAST
    # Nothing sticks out: only tables scroll sideways, inside their frames.
    assert seen["wide"] <= width
    assert set(seen["figures"]) == FIGURES
    for name, figure in seen["figures"].items():
        shown_width, height, right = figure["box"]
        assert shown_width > 250 and height > 80, name
        assert right <= width, name
        assert figure["marks"] > 3, name
        assert figure["texts"], name
        # Letters of a figure shrink with it.
        scale = shown_width / figure["viewed"]
        for text, fill, size, _, _, text_right in figure["texts"]:
            assert contrast(fill, seen["paper"]) >= LEAST_CONTRAST, (name, text)
            assert size * scale >= 9, (name, text)
            assert text_right <= right + 2, (name, text)


def test_text_on_coloured_cells_is_legible() -> None:
    for palette in (LIGHT, DARK):
        for colour in (palette.heat, palette.loss, palette.gain):
            assert contrast(rgb(palette.ink), rgb(colour)) >= LEAST_CONTRAST
