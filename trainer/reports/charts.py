"""Draws curves: as SVG within HTML for a page, and as characters for a terminal.

The lines of a chart on a page are an SVG that is stretched to the width of the page; the words beside them are HTML, so
that they have the size of the page's text on a phone, too. It is complete without JavaScript.
"""

import html
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
# A chart draws at most this many points of a line: of each group of neighbours the lowest and the highest one.
MAX_POINTS = 800
# A scale is logarithmic if the largest value is at least this many times the smallest.
_LOG_FROM = 5.0
# The room above and below the lines, as a share of the height.
_ROOM = 0.04
NUM_COLORS = 6  # In page.css.
# The SVG's own units, which the page stretches.
_UNITS = 1000.0
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # The dots of a braille character, by row and column.


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        name: its name in the legend.
        points: x and y of each point, by rising x.
        color: the number of its color; there are `NUM_COLORS`.
        is_dotted: whether each point is drawn, as for the few scores of a validation text.
    """

    name: str
    points: Points
    color: int = 0
    is_dotted: bool = False


class Scale(NamedTuple):
    """Maps values to places from 0 to 1.

    Attributes:
        low: the value at 0.
        high: the value at 1.
        is_log: whether equal ratios are equal distances.
        ticks: the values to be labelled.
    """

    low: float
    high: float
    is_log: bool
    ticks: list[float]

    def place(self, value: float) -> float:
        """Returns the place of a value; values beyond the ends are at the ends."""
        change: Callable[[float], float] = math.log if self.is_log else float
        value = min(max(value, self.low), self.high)
        return (change(value) - change(self.low)) / (change(self.high) - change(self.low))


def make_scale(values: Sequence[float], from_zero: bool = False, may_be_log: bool = False, most: int = 6) -> Scale:
    """Returns the scale for some values.

    Args:
        values: finite numbers, at least one.
        from_zero: whether the scale begins at 0, if no value is below it.
        may_be_log: whether a wide range of positive values gets a logarithmic scale.
        most: the most ticks.
    """
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high >= _LOG_FROM * low:
        ticks = _log_ticks(low, high, most)
        if len(ticks) > 1:
            return Scale(min(low, ticks[0]) if ticks[0] > low * 0.97 else low, high, True, ticks)
    if from_zero and low >= 0:
        low = 0.0
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    size = _nice((high - low) / most)
    first = math.ceil(low / size - 1e-9)
    ticks = [round(i * size, 12) + 0.0 for i in range(first, math.floor(high / size + 1e-9) + 1)]
    return Scale(low, high, False, ticks)


def padded(scale: Scale) -> Scale:
    """Returns a scale with some room beyond its ends, except below 0."""
    if scale.is_log:
        room = (scale.high / scale.low) ** _ROOM
        return scale._replace(low=scale.low / room, high=scale.high * room)
    room = (scale.high - scale.low) * _ROOM
    return scale._replace(low=scale.low - room * (scale.low != 0), high=scale.high + room)


def _nice(size: float) -> float:
    """Returns the smallest of 1, 2 and 5 times a power of 10 that is not below a size."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= size * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Returns round numbers between two numbers, the finest ones that are not too many."""
    for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [round(digit * 10.0**power, 12) for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def short(value: float) -> str:
    """Returns a number for an axis: at most 4 digits, with k, M, B or T for thousands and more."""
    if value == 0:
        return "0"
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """Returns at most this many of the points: of each group of neighbours the lowest and the highest one, and the last
    point of all.
    """
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / (most - 2))
    kept = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ends = {min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def chart(
    title: str,
    lines: Sequence[Line],
    x_name: str,
    unit: str = "",
    from_zero: bool = False,
    may_be_log: bool = False,
    is_large: bool = False,
) -> str:
    """Returns a chart as HTML; "" if no line has points.

    Args:
        title: what is drawn.
        lines: the lines. Points that are not finite are left out.
        x_name: what the x axis shows, such as "step".
        unit: the unit of y.
        from_zero: as in `make_scale`, for y.
        may_be_log: as in `make_scale`, for y.
        is_large: whether the chart is high.
    """
    lines = [line._replace(points=[p for p in line.points if math.isfinite(p[1])]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    most = 7 if is_large else 4
    x = make_scale([each for line in lines for each, _ in line.points], most=most)
    y = padded(make_scale([each for line in lines for _, each in line.points], from_zero, may_be_log, most))
    shown = f"{html.escape(title)}{f' <span>{html.escape(unit)}</span>' if unit else ''}"
    log = ' <span class="log">log scale</span>' if y.is_log else ""
    legend = "".join(
        f'<li class="c{line.color}{" dotted" if line.is_dotted else ""}">{html.escape(line.name)} '
        f"<b>{number(line.points[-1][1])}</b></li>"
        for line in lines
    )
    y_ticks = "".join(f'<span style="bottom:{y.place(tick):.2%}">{short(tick)}</span>' for tick in y.ticks)
    x_ticks = "".join(f'<span style="left:{x.place(tick):.2%}">{short(tick)}</span>' for tick in x.ticks)
    return (
        f'<figure class="chart{" large" if is_large else ""}">\n<figcaption><h3>{shown}{log}</h3>'
        f'<ul class="legend">{legend}</ul></figcaption>\n'
        f'<div class="area"><div class="y">{y_ticks}</div>'
        f'<div class="plot" data-x="{html.escape(x_name)}" data-lines="{_data(lines, x, y)}">'
        f"{_svg(lines, x, y, title)}</div>"
        f'<div class="x">{x_ticks}</div></div>\n<p class="x-name">{html.escape(x_name)}</p>\n</figure>\n'
    )


def _svg(lines: Sequence[Line], x: Scale, y: Scale, title: str) -> str:
    grid = "".join(f"M0 {_across(1 - y.place(tick))}H{_UNITS:g}" for tick in y.ticks)
    grid += "".join(f"M{_across(x.place(tick))} 0V{_UNITS:g}" for tick in x.ticks)
    paths = [f'<path class="grid" d="{grid}"/>']
    for line in lines:
        places = [(_across(x.place(a)), _across(1 - y.place(b))) for a, b in thinned(line.points)]
        if len(places) > 1:
            paths.append(f'<path class="line c{line.color}" d="M{"L".join(f"{a} {b}" for a, b in places)}"/>')
        if line.is_dotted or len(places) == 1:
            # Dots are lines without a length: a circle would be stretched with the chart.
            dots = "".join(f"M{a} {b}h0" for a, b in places)
            paths.append(f'<path class="dots c{line.color}" d="{dots}"/>')
    return (
        f'<svg viewBox="0 0 {_UNITS:g} {_UNITS:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(paths)}</svg>'
    )


def _across(place: float) -> str:
    return f"{place * _UNITS:.1f}".removesuffix(".0")


def _data(lines: Sequence[Line], x: Scale, y: Scale) -> str:
    """Returns what the page's script needs to show the values under the pointer: places, and values as words."""
    data = [
        {
            "name": line.name,
            "color": line.color,
            "points": [
                [round(x.place(a), 4), round(1 - y.place(b), 4), f"{a:,.0f}", number(b)]
                for a, b in thinned(line.points)
            ],
        }
        for line in lines
    ]
    return html.escape(json.dumps(data, separators=(",", ":")))


def number(value: float) -> str:
    """Returns a value with five digits, as a reader expects it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


def text_chart(lines: Sequence[Line], width: int, height: int = 12, is_ascii: bool = False) -> list[str]:
    """Returns a chart for a terminal: the first line in dots of braille, the others in marks.

    Args:
        lines: the lines. Points that are not finite are left out.
        width: the columns of the terminal.
        height: the rows of the chart.
        is_ascii: whether the terminal has ASCII only.
    """
    lines = [line._replace(points=[p for p in line.points if math.isfinite(p[1])]) for line in lines]
    marks = marks_of(len(lines), is_ascii)
    marks = [mark for mark, line in zip(marks, lines, strict=True) if line.points]
    lines = [line for line in lines if line.points]
    if not lines:
        return []
    x = make_scale([each for line in lines for each, _ in line.points], most=4)
    y = make_scale([each for line in lines for _, each in line.points], may_be_log=True, most=height // 2)
    labels = {round((1 - y.place(tick)) * (height - 1)): short(tick) for tick in y.ticks}
    margin = max(map(len, labels.values()), default=0)
    columns = max(20, width - margin - 3)
    cells = [[0] * columns for _ in range(height)]
    marked: dict[tuple[int, int], str] = {}
    for line, mark in zip(lines, marks, strict=True):
        places = [(x.place(a) * (columns * 2 - 1), (1 - y.place(b)) * (height * 4 - 1)) for a, b in line.points]
        for column, row in places if mark else _joined(places):
            across, down = round(column) // 2, round(row) // 4
            if mark:
                marked[down, across] = mark
            else:
                cells[down][across] |= _DOTS[round(row) % 4][round(column) % 2]
    shown = []
    for row in range(height):
        signs = [("." if is_ascii else chr(0x2800 + dots)) if dots else " " for dots in cells[row]]
        signs = [marked.get((row, column), sign) for column, sign in enumerate(signs)]
        shown.append(
            f"{labels.get(row, ''):>{margin}} {'|' if is_ascii else '┤' if row in labels else '│'}{''.join(signs)}"
        )
    axis = [" "] * columns
    for tick in x.ticks:
        word, at = short(tick), round(x.place(tick) * (columns - 1))
        at = min(max(0, at - len(word) // 2), columns - len(word))
        axis[at : at + len(word)] = word
    return [*shown, f"{'':{margin}}  {''.join(axis).rstrip()}"]


def marks_of(num_lines: int, is_ascii: bool) -> list[str]:
    """Returns the mark of each line of a chart for a terminal; "" for the first line, which has dots."""
    marks = itertools.cycle("x+*#@" if is_ascii else "●○◆◇■")
    return ["", *(next(marks) for _ in range(num_lines - 1))][:num_lines]


def _joined(places: Points) -> Iterator[tuple[float, float]]:
    """Yields places with the places between them, a dot apart."""
    yield places[0]
    for (a, b), (c, d) in itertools.pairwise(places):
        steps = max(1, round(abs(c - a)), round(abs(d - b)))
        yield from ((a + (c - a) * i / steps, b + (d - b) * i / steps) for i in range(1, steps + 1))
