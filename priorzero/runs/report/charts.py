"""Line charts as SVG text for a page. Colours come from the page's style sheet (classes ``c0`` to ``c5``)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

MAX_POINTS = 400  # of a series; more cannot be distinguished
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40  # margins in pixels


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one kind, sorted by x.

    Attributes:
        label: for the legend.
        points: finite numbers.
        kind: ``line`` connects them, ``dots`` draws each, ``marks`` connects them and draws each in the colour's shape.
        colour: number of the colour and of the shape, 0 to 5.
    """

    label: str
    points: Points
    kind: Literal["line", "dots", "marks"]
    colour: int

    @property
    def key(self) -> Markup:
        """A small picture for the legend."""
        drawn = {
            "line": Markup('<polyline points="-8,0 8,0"/>'),
            "dots": Markup('<circle class="dots" r="3"/>'),
            "marks": mark(self.colour),
        }
        return Markup('<svg class="key c{}" viewBox="-8 -8 16 16">{}</svg>').format(self.colour, drawn[self.kind])


# By colour, around the origin. They stay distinguishable if they lie on each other, and without colours.
SHAPES = ("0,-5 5,0 0,5 -5,0", "-4,-4 4,-4 4,4 -4,4", "0,-6 5,4 -5,4", "0,6 5,-4 -5,-4", "-5,0 5,0", "0,-5 0,5")


def mark(colour: int) -> Markup:
    """A shape at the origin."""
    return Markup('<polygon class="mark" points="{}"/>').format(SHAPES[colour])


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) that cover ``low`` to ``high``."""
    if high <= low:  # one value: half of it on either side
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def thin(points: Points, *, limit: int = MAX_POINTS) -> Points:
    """At most ``limit`` of the points, evenly spaced, with the first and the last."""
    if len(points) <= limit:
        return points
    return [points[round(n * (len(points) - 1) / (limit - 1))] for n in range(limit)]


def bucket_means(points: Points, *, limit: int = MAX_POINTS) -> Points:
    """At most ``limit`` points, each the mean of as many neighbours as the others (one more or less)."""
    if len(points) <= limit:
        return points
    bounds = [n * len(points) // limit for n in range(limit + 1)]
    buckets = [points[low:high] for low, high in itertools.pairwise(bounds)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def running_mean(points: Points, *, window: int) -> Points:
    """For each point, the mean of the last ``window`` values up to it (fewer at the beginning)."""
    means, total = [], 0.0
    for n, (x, y) in enumerate(points):
        total += y - (points[n - window][1] if n >= window else 0.0)
        means.append((x, total / min(n + 1, window)))
    return means


@dataclass(frozen=True)
class _Frame:
    """Maps numbers to pixels."""

    xs: Sequence[float]  # ticks
    ys: Sequence[float]
    width: int
    height: int

    def x(self, value: float) -> str:
        share = (value - self.xs[0]) / (self.xs[-1] - self.xs[0])
        return f"{LEFT + share * (self.width - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        share = (value - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return f"{self.height - BOTTOM - share * (self.height - TOP - BOTTOM):.1f}"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    width: int = 1000,
    height: int = 320,
    limit: float = math.nan,
    from_zero: bool = False,
) -> Markup:
    """A chart with axes.

    Args:
        series: drawn in this order; at least one has points.
        title: what it shows, for screen readers.
        x_label: under the x axis.
        width, height: in pixels.
        limit: y of a dashed line, such as the largest possible score; NaN for none.
        from_zero: the y axis includes zero.
    """
    points = [point for one in series for point in one.points]
    ys = [y for _, y in points] + ([limit] if math.isfinite(limit) else []) + ([0.0] if from_zero else [])
    frame = _Frame(
        xs=ticks(0.0, max(x for x, _ in points), count=width // 130),
        ys=ticks(min(ys), max(ys), count=height // 55),
        width=width,
        height=height,
    )
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, title)]
    parts += _axes(frame, x_label)
    if math.isfinite(limit):
        y = frame.y(limit)
        parts.append(Markup('<line class="limit" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, width - RIGHT, y, y))
    for one in series:
        parts += _drawn(one, frame)
    return Markup("").join([*parts, Markup("</svg>")])


def _axes(frame: _Frame, x_label: str) -> list[Markup]:
    bottom, right = frame.height - BOTTOM, frame.width - RIGHT
    parts = []
    for value in frame.ys:
        y = frame.y(value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, y, y))
        parts.append(
            Markup('<text class="end" x="{}" y="{}" dy="0.32em">{}</text>').format(LEFT - 6, y, _tick_text(value))
        )
    for value in frame.xs:
        x = frame.x(value)
        parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(x, x, bottom, bottom + 4))
        parts.append(Markup('<text class="mid" x="{}" y="{}">{}</text>').format(x, bottom + 17, _tick_text(value)))
    middle = (LEFT + right) / 2
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, bottom, bottom))
    parts.append(Markup('<text class="mid" x="{}" y="{}">{}</text>').format(middle, frame.height - 6, x_label))
    return parts


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e7 else f"{value:g}"


def _drawn(one: Series, frame: _Frame) -> list[Markup]:
    points = thin(one.points) if one.kind == "dots" else bucket_means(one.points)
    places = [(frame.x(x), frame.y(y)) for x, y in points]
    parts = []
    if one.kind != "dots" and len(places) > 1:
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(Markup('<polyline class="{} c{}" points="{}"/>').format(one.kind, one.colour, path))
    if one.kind == "marks":
        for (x, y), (step, value) in zip(places, points, strict=True):
            about = f"{one.label}: {value:.4g} at {step:g}"
            parts.append(
                Markup('<g class="c{}" transform="translate({} {})">{}<title>{}</title></g>').format(
                    one.colour, x, y, mark(one.colour), about
                )
            )
    elif one.kind == "dots" or len(places) == 1:
        kind, radius = ("dots", 2.5) if one.kind == "dots" else ("point", 4)
        dot = Markup('<circle class="{} c{}" cx="{}" cy="{}" r="{}"/>')
        parts += [dot.format(kind, one.colour, x, y, radius) for x, y in places]
    return parts
