"""How figures look, and how they become files: SVG that follows the page's theme, or PNG.

In SVG every colour is a CSS variable of the page, so that one figure serves light and dark, and
text stays text in the page's own font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """Colours by what they mean."""

    ink: str
    muted: str
    grid: str
    paper: str
    full: str
    slide: str
    heat: str
    loss: str
    gain: str
    one: str
    two: str
    three: str
    four: str
    five: str

    @property
    def series(self) -> tuple[str, ...]:
        """Of lines and points, in the order they are given out."""
        return (self.one, self.two, self.three, self.four, self.five)


_LIGHT_AND_DARK = {
    "ink": ("#1b2027", "#e6eaf0"),
    "muted": ("#5b6572", "#9aa5b4"),
    "grid": ("#dfe4ea", "#303945"),
    "paper": ("#ffffff", "#161b22"),
    "full": ("#2563c9", "#6ea3ff"),
    "slide": ("#b4bdc9", "#4d5866"),
    "heat": ("#74a9f7", "#2a5db0"),
    "loss": ("#f08a7e", "#a63d33"),
    "gain": ("#74c69d", "#256b4a"),
    "one": ("#5b6572", "#a9b3c1"),
    "two": ("#2563c9", "#6ea3ff"),
    "three": ("#c2570c", "#f59e5b"),
    "four": ("#0f7b5f", "#4cc9a0"),
    "five": ("#8a3ea8", "#cf8cf0"),
}
LIGHT, DARK = (
    Palette(**{name: both[theme] for name, both in _LIGHT_AND_DARK.items()}) for theme in (0, 1)
)
# They stand for the page's variables while a figure is drawn.
MARKS = Palette(*(f"#fe00{number:02x}" for number in range(1, len(fields(Palette)) + 1)))

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "svg.fonttype": "none",
    # The same figure gives the same file.
    "svg.hashsalt": "hybridize",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
# Wide enough for a phone's screen at the size it is drawn.
WIDTH_INCHES = 4.8
_PNG_DPI = 200


@contextmanager
def drawing() -> Iterator[None]:
    """Draw and save in our style."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(
    height_inches: float, palette: Palette, columns: int = 1, rows: int = 1
) -> tuple[Figure, Any]:
    """A figure and its axes: one, or an array of several in `columns` or `rows`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in figure.axes:
        one.set_facecolor("none")
        one.tick_params(colors=palette.muted, length=0)
        one.xaxis.label.set_color(palette.muted)
        one.yaxis.label.set_color(palette.muted)
        for spine in one.spines.values():
            spine.set_color(palette.grid)
        one.grid(color=palette.grid, linewidth=0.8)
    return figure, axes


def legend_above(axes: Any, palette: Palette) -> None:
    """A legend in two columns above the axes, in the palette's ink."""
    where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(**where, ncols=2, labelcolor=palette.ink)


def draw_dot(
    axes: Any, row: float, value: tuple[float, float, float], colour: str, label: str | None = None
) -> None:
    """A value with its interval (value, low, high) across a row."""
    axes.plot(value[1:], [row, row], color=colour, linewidth=1.8, solid_capstyle="round")
    axes.plot([value[0]], [row], "o", markersize=5, color=colour, label=label)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """A figure drawn in `MARKS` as an SVG element to put into a page.

    Args:
        name: makes its ids differ from those of the page's other figures.
        description: what it shows, for those who do not see it.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for field, mark in asdict(MARKS).items():
        text = text.replace(mark, f"var(--{field})")
    # The page's font; sizes stay.
    text = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>",
        rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        rf'viewBox="\1" role="img" aria-label="{label}" data-figure="{name}">',
        text,
        count=1,
    )


def to_png(figure: Figure, palette: Palette) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(
        file, format="png", dpi=_PNG_DPI, facecolor=palette.paper, metadata={"Software": None}
    )
    return file.getvalue()
