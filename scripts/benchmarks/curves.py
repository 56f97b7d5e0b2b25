"""Draws the curves of time_to_loss.py as a PNG, with Pillow, which TensorBoard brings along.

It is no page with a picture taken of it, as the pictures of TensorBoard are: this needs no browser.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from trainer.reports.charts import Line, Scale, make_scale, padded, short

WIDTH, HEIGHT = 1400, 560
# Drawn this many times as large, then made smaller: Pillow draws lines without smooth edges.
LARGER = 3
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 84, 56
TEXT, SOFT, GRID, TARGET = "#1f2937", "#64748b", "#e2e8f0", "#94a3b8"
COLORS = ("#2563eb", "#d9480f", "#0f8a5f", "#9333ea", "#b58900", "#0e7490")  # As on the pages of `trainer report`.


class Panel(NamedTuple):
    """A chart of the picture.

    Attributes:
        x_name: what its x axis shows.
        lines: its lines; lines of one name have one color, and one place in the legend.
    """

    x_name: str
    lines: Sequence[Line]


def draw(file: Path, title: str, panels: Sequence[Panel], target: float | None = None) -> None:
    """Writes charts side by side, with one y axis and one legend.

    Args:
        file: the PNG.
        title: the text above them.
        panels: the charts; the x axis is logarithmic if its values are far apart.
        target: a value of y to mark by a line.
    """
    image = Image.new("RGB", (WIDTH * LARGER, HEIGHT * LARGER), "white")
    pen = ImageDraw.Draw(image)
    values = [y for panel in panels for line in panel.lines for _, y in line.points]
    y = padded(make_scale([*values, *([] if target is None else [target])], most=8))
    _write(pen, LEFT, 12, title, TEXT, 22)
    _write_legend(pen, panels[0].lines)
    width = (WIDTH - LEFT - RIGHT) / len(panels)
    for number, panel in enumerate(panels):
        x = make_scale([value for line in panel.lines for value, _ in line.points], may_be_log=True, most=8)
        # Between two charts there is room for the numbers of the right one.
        box = (LEFT + number * width, TOP, LEFT + (number + 1) * width - (LEFT if panel is not panels[-1] else 0))
        _draw_panel(pen, (box[0], box[1], box[2], HEIGHT - BOTTOM), panel, x, y, target)
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(file, optimize=True)


def _draw_panel(
    pen: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    panel: Panel,
    x: Scale,
    y: Scale,
    target: float | None,
) -> None:
    left, top, right, bottom = box

    def at(a: float, b: float) -> tuple[float, float]:
        return (left + x.place(a) * (right - left)) * LARGER, (bottom - y.place(b) * (bottom - top)) * LARGER

    for tick in x.ticks:
        across, _ = at(tick, y.low)
        pen.line([(across, top * LARGER), (across, bottom * LARGER)], GRID, LARGER)
        _write(pen, across / LARGER, bottom + 8, short(tick), SOFT, 14, "ma")
    for tick in y.ticks:
        _, down = at(x.low, tick)
        pen.line([(left * LARGER, down), (right * LARGER, down)], GRID, LARGER)
        _write(pen, left - 8, down / LARGER, short(tick), SOFT, 14, "rm")
    if target is not None:
        pen.line([at(x.low, target), at(x.high, target)], TARGET, 2 * LARGER)
        _write(pen, right, at(x.high, target)[1] / LARGER - 3, short(target), SOFT, 14, "rs")
    colors = _colors(panel.lines)
    for line in panel.lines:
        pen.line([at(a, b) for a, b in line.points], colors[line.name], 2 * LARGER, joint="curve")
    _write(pen, (left + right) / 2, bottom + 30, panel.x_name, TEXT, 16, "ma")


def _write_legend(pen: ImageDraw.ImageDraw, lines: Sequence[Line]) -> None:
    across = float(LEFT)
    for name, color in _colors(lines).items():
        pen.line([(across * LARGER, 60 * LARGER), ((across + 22) * LARGER, 60 * LARGER)], color, 4 * LARGER)
        across += 30 + _write(pen, across + 30, 60, name, TEXT, 16, "lm") + 28


def _colors(lines: Sequence[Line]) -> dict[str, str]:
    """Returns the color of each name, in the order of the lines."""
    names = list(dict.fromkeys(line.name for line in lines))
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}


def _write(
    pen: ImageDraw.ImageDraw, across: float, down: float, text: str, color: str, size: int, anchor: str = "la"
) -> float:
    """Writes a text, and returns its width."""
    font = ImageFont.load_default(size * LARGER)
    pen.text((across * LARGER, down * LARGER), text, color, font, anchor)
    return pen.textlength(text, font) / LARGER
