"""Curves and time lines as the numbers of an SVG: drawn by a template, without a plotting library. All are pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

from orchestrator.api.job import Attempt, QLoRAJob
from orchestrator.sdk.words import duration

WIDTH, HEIGHT = 640, 200
"""Of a curve, in the SVG's own units; the browser scales it."""
LEFT, RIGHT, TOP, BOTTOM = 84, 12, 10, 24
MOST_POINTS = 400
"""Of a curve; of more, one for some neighbours each is drawn."""
ROW_HEIGHT = 26
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    style: str
    """The class that colours it."""
    path: str
    """What a `polyline` takes."""
    dots: tuple[tuple[str, str], ...] = ()
    """Where it has few points, each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A label on an axis, or a level across the chart."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over steps."""

    title: str
    told: str
    """The same in words, for who cannot see it."""
    lines: tuple[Line, ...]
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    level: Mark | None = None
    """What was expected."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def chart(
    title: str,
    curves: Sequence[tuple[str, str, Points]],
    unit: str = "",
    level: tuple[str, float] | None = None,
    kept: Callable[[Sequence[float]], float] = fmean,
) -> Chart | None:
    """Curves of name, style and points, with a level across them; None where there is nothing to draw.

    `kept` says what of neighbours is drawn where there are many points: their mean, or of peaks the highest.
    """
    curves = [(name, style, thinned(_finite(points), kept)) for name, style, points in curves]
    curves = [each for each in curves if each[2]]
    if not curves:
        return None
    xs = [x for _, _, points in curves for x, _ in points]
    ys = [y for _, _, points in curves for _, y in points] + ([level[1]] if level is not None else [])
    across = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    steps = nice_steps(min(ys), max(ys))
    up = _Scale(min(steps[0], min(ys)), max(steps[-1], max(ys)), HEIGHT - BOTTOM, TOP)
    return Chart(
        title=title,
        told="; ".join(_told(name, points, unit) for name, _, points in curves),
        lines=tuple(_line(name, style, points, across, up) for name, style, points in curves),
        x_marks=tuple(Mark(at=across.at(x), text=f"{x:.0f}") for x in dict.fromkeys((min(xs), max(xs)))),
        y_marks=tuple(Mark(at=up.at(y), text=_short(y)) for y in steps),
        level=Mark(at=up.at(level[1]), text=level[0]) if level is not None else None,
    )


def thinned(points: Points, kept: Callable[[Sequence[float]], float]) -> Points:
    """No more than MOST_POINTS: one for some neighbours each, and the last one as it is."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil((len(points) - 1) / (MOST_POINTS - 1))
    groups = [points[start : min(start + size, len(points) - 1)] for start in range(0, len(points) - 1, size)]
    return [*((fmean([x for x, _ in group]), kept([y for _, y in group])) for group in groups), points[-1]]


def nice_steps(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, 1, 2 or 5 times a power of ten apart (Heckbert, 1990)."""
    spread = high - low or abs(high) or 1.0
    raw = spread / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and abs(y) < 1e300]


def _line(name: str, style: str, points: Points, across: _Scale, up: _Scale) -> Line:
    places = [(f"{across.at(x):g}", f"{up.at(y):g}") for x, y in points]
    path = " ".join(f"{x},{y}" for x, y in places)
    return Line(name=name, style=style, path=path, dots=tuple(places) if len(places) <= 20 else ())


def _told(name: str, points: Points, unit: str) -> str:
    (first, began), (last, now) = points[0], points[-1]
    return f"{name} from {_short(began)}{unit} at step {first:.0f} to {_short(now)}{unit} at step {last:.0f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One attempt on the time line."""

    x: float
    width: float
    y: int
    style: str
    label: str
    told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLine:
    """A job's attempts over time, a row a stage."""

    bars: tuple[Bar, ...]
    rows: tuple[tuple[int, str], ...]
    began: str
    ends: str
    height: int
    width: int = WIDTH
    left: int = LEFT


def time_line(job: QLoRAJob, now: datetime) -> TimeLine | None:
    """The attempts that a status keeps; None where there are none."""
    attempts = job.status.attempts
    if not attempts:
        return None
    began = min(attempt.created_time for attempt in attempts)
    ended = max(attempt.finish_time or now for attempt in attempts)
    stages = [stage for stage in ("prepare", "train", "publish") if any(a.stage == stage for a in attempts)]
    scale = _Scale(0.0, max(1.0, (ended - began).total_seconds()), LEFT, WIDTH - RIGHT)
    return TimeLine(
        bars=tuple(_bars(attempts, stages, began, now, scale)),
        rows=tuple((number * ROW_HEIGHT + 17, stage) for number, stage in enumerate(stages)),
        began=f"{began:%Y-%m-%d %H:%M} UTC",
        ends=f"{duration((ended - began).total_seconds())} later",
        height=len(stages) * ROW_HEIGHT + 20,
    )


def _bars(
    attempts: Iterable[Attempt], stages: Sequence[str], began: datetime, now: datetime, scale: _Scale
) -> Iterable[Bar]:
    for attempt in attempts:
        start, end = (
            ((moment - began).total_seconds()) for moment in (attempt.created_time, attempt.finish_time or now)
        )
        x = scale.at(start)
        reason = attempt.reason or attempt.stop_reason
        on = f" on {attempt.gpu_class}" if attempt.gpu_class else ""
        yield Bar(
            x=x,
            width=max(2.0, round(scale.at(max(start, end)) - x, 1)),
            y=stages.index(attempt.stage) * ROW_HEIGHT + 3,
            style="busy" if attempt.active else "good" if attempt.exit_code == 0 else "waiting",
            label=str(attempt.number),
            told=f"{attempt.stage} {attempt.number}{on}: {duration(max(0.0, end - start))}"
            + (f", {reason.value}" if reason is not None else ""),
        )
