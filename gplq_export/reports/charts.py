"""Charts as SVG text: no library, so that every installation draws them, and few bytes, so that a page holds many.

Colours and lines are classes that the page defines, so that they follow its light or dark scheme: ``s0`` to ``s5`` for
series, ``dashed`` after these six, ``axis``, ``grid``, ``band``, ``mark``. What is not finite is not
drawn; a line has a gap there.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

_COLOURS = 6
_WIDTH, _HEIGHT, _SQUARE = 440, 210, 320  # of what the axes enclose
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 180, 12, 42  # around it; the legend is at the right
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_HUGE = 1e200  # beyond it, differences of two numbers overflow


@dataclass(frozen=True)
class Axis:
    """What is along a side. ``log``: numbers that are not positive are drawn at its lower end."""

    label: str
    log: bool = False


@dataclass(frozen=True)
class Series:
    """Points (x, y) with a name for the legend; ``marks``: points that have something to say, (x, y, text)."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "dots"] = "line"
    marks: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class Band:
    """An area between two lines: (x, low, high)."""

    name: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class _Scale:
    """Numbers along an axis, and where on it they lie: 0 is its beginning, 1 its end."""

    low: float
    high: float
    log: bool
    ticks: list[float] = field(default_factory=list)

    def place(self, value: float) -> float:
        if self.log:
            if value <= 0:
                return 0.0
            place = math.log10(value / self.low) / math.log10(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(max(place, 0.0), 1.0)


def plot(
    title: str, x: Axis, y: Axis, series: Sequence[Series], band: Band | None = None, *, diagonal: bool = False
) -> Markup:
    """Lines and dots over two axes. ``diagonal``: a square without legend, and a line where y = x."""
    points = [point for each in series for point in each.points if _drawn(point)]
    area = [point for point in (band.points if band else ()) if _drawn(point)]
    across = [point[0] for point in (*points, *area)]
    up = [point[1] for point in points] + [value for point in area for value in point[1:]]
    if diagonal:
        across = up = across + up
    scales = _scale(across, log=x.log), _scale(up, log=y.log)
    width, height = (_SQUARE, _SQUARE) if diagonal else (_WIDTH, _HEIGHT)

    def at(point: Sequence[float]) -> tuple[float, float]:
        return _LEFT + width * scales[0].place(point[0]), _TOP + height * (1 - scales[1].place(point[1]))

    parts = [*_axes((x, y), scales, (width, height))]
    if band is not None and area:
        edge = [at((place, high)) for place, _, high in area] + [at((place, low)) for place, low, _ in reversed(area)]
        parts.append(f'<path class="band" d="M{_path(edge)}Z"/>')
    if diagonal:
        ends = [at((scales[0].low, scales[0].low)), at((scales[0].high, scales[0].high))]
        parts.append(f'<path class="diagonal" d="M{_path(ends)}"/>')
    for index, each in enumerate(series):
        colour = _colour(index)
        if each.kind == "dots":
            dots = "".join(f"M{_path([at(point)])}h0" for point in each.points if _drawn(point))
            parts.append(f'<path class="dots {colour}" d="{dots}"/>')
        else:
            runs = "".join(f"M{_path([at(point) for point in run])}" for run in _runs(each.points))
            parts.append(f'<path class="line {colour}" d="{runs}"/>')
        for horizontal, vertical, text in each.marks:
            if _drawn((horizontal, vertical)):
                cx, cy = at((horizontal, vertical))
                circle = f'<circle class="mark" cx="{cx:.1f}" cy="{cy:.1f}" r="5">'
                parts.append(f"{circle}<title>{escape(text)}</title></circle>")
    if not diagonal:
        parts += _legend([each.name for each in series], band, _LEFT + width + 16)
    name = escape(title)
    total = f"{_LEFT + width + (_TOP if diagonal else _RIGHT)} {_TOP + height + _BOTTOM}"
    return Markup(
        f'<svg class="chart{" square" * diagonal}" viewBox="0 0 {total}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )


def bar(value: float, most: float, kind: str = "s0") -> Markup:
    """A bar for the cell of a table: ``value`` of ``most``; empty for what is not positive, or no number."""
    share = 0.0 if math.isnan(value) or most <= 0 else min(max(value / most, 0.0), 1.0) if value < math.inf else 1.0
    return Markup(
        '<svg class="bar" width="120" height="10" aria-hidden="true"><rect class="track" width="120" height="10"/>'
        '<rect class="fill {}" width="{:.1f}" height="10"/></svg>'
    ).format(kind, 120 * share)


def _drawn(point: Iterable[float]) -> bool:
    return all(abs(value) < _HUGE for value in point)  # not so for NaN


def _runs(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """A line's pieces between what cannot be drawn."""
    run: list[tuple[float, float]] = []
    for point in points:
        if _drawn(point):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _colour(index: int) -> str:
    return f"s{index % _COLOURS}" + " dashed" * (index >= _COLOURS)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _scale(values: Sequence[float], *, log: bool) -> _Scale:
    """Round limits around the values, and about five round numbers between them."""
    if log:
        exponents = [math.log10(value) for value in values if value > 1 / _HUGE] or [0.0]
        lowest, highest = math.floor(min(exponents)), math.ceil(max(exponents))
        highest = max(highest, lowest + 1)
        decades = range(lowest, highest + 1, max(1, (highest - lowest) // 5))
        steps = (1, 2, 5) if highest - lowest <= 2 else (1,)
        ticks = [step * 10.0**decade for decade in decades for step in steps if decade < highest or step == 1]
        return _Scale(10.0**lowest, 10.0**highest, log, ticks)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one number, or as good as one
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(nice for nice in (1, 2, 5, 10) if nice * unit >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return _Scale(first * step, last * step, log, [index * step for index in range(first, last + 1)])


def _axes(axes: tuple[Axis, Axis], scales: tuple[_Scale, _Scale], size: tuple[int, int]) -> Iterator[str]:
    width, height = size
    bottom, right = _TOP + height, _LEFT + width
    for value in scales[0].ticks:
        place = _LEFT + width * scales[0].place(value)
        yield f'<path class="grid" d="M{place:.1f},{_TOP}V{bottom}"/>'
        yield f'<text x="{place:.1f}" y="{bottom + 16}" text-anchor="middle">{_tick(value, scales[0])}</text>'
    for value in scales[1].ticks:
        place = bottom - height * scales[1].place(value)
        yield f'<path class="grid" d="M{_LEFT},{place:.1f}H{right}"/>'
        yield f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{_tick(value, scales[1])}</text>'
    yield f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>'
    across, up = (escape(axis.label) for axis in axes)
    yield f'<text x="{_LEFT + width / 2:.0f}" y="{bottom + 36}" text-anchor="middle">{across}</text>'
    middle = _TOP + height / 2
    yield f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{up}</text>'


def _tick(value: float, scale: _Scale) -> str:
    """A tick's number; far from 1 on a logarithmic axis, a power of ten."""
    if scale.log and not 1e-3 <= value < 1e5:
        mantissa, exponent = f"{value:.0e}".split("e")
        factor = "" if mantissa == "1" else f"{mantissa}·"
        return f"{factor}10{str(int(exponent)).translate(_RAISED)}"
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _legend(names: Sequence[str], band: Band | None, x: float) -> Iterator[str]:
    entries = [(f"line {_colour(index)}", name) for index, name in enumerate(names)]
    if band is not None:
        entries.append(("band", band.name))
    for row, (kind, name) in enumerate(entries):
        y = _TOP + 8 + 18 * row
        mark = f"M{x:.0f},{y - 5}h16v8h-16Z" if kind == "band" else f"M{x:.0f},{y}h16"
        short = name if len(name) <= 22 else f"{name[:21]}…"
        yield f'<path class="{kind}" d="{mark}"/><text x="{x + 22:.0f}" y="{y + 4}">{escape(short)}</text>'
