"""Held-out loss against trained parameters, every point with its name beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Point", "draw"]

_OURS, _PEFT, _QUIET = "tab:blue", "tab:orange", "0.45"
# where a label may stand, in points from its dot
_PLACES = [
    (dx * reach, dy * reach)
    for reach in (1.0, 1.5, 2.2, 3.0, 4.0, 5.5, 7.5, 10.0, 14.0, 19.0)
    for dx, dy in ((7, 0), (-7, 0), (0, 7), (0, -7), (6, 5), (-6, 5), (6, -5), (-6, -5))
]


class Point(Protocol):
    """One setting: its name, whether it is ours, the mean of its losses and their standard error."""

    setting: str
    parameters: int

    @property
    def ours(self) -> bool: ...

    @property
    def loss(self) -> float: ...

    @property
    def error(self) -> float | None: ...


def draw(
    found: Sequence[Point],
    path: Path,
    title: str,
    unit: str,
    levels: Mapping[str, float],
    top: float | None = None,
) -> None:
    """A PNG.

    Args:
        unit: of the loss.
        levels: what is drawn as a line across, by its name.
        top: a setting that is no better is drawn at the upper edge.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not found:
        return
    figure = Figure(figsize=(14, 9), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots()
    best = min(row.loss for row in found)
    top = max(row.loss for row in found) if top is None else top
    span = (top - best) or 1.0
    axes.set(
        xscale="log",
        xlabel="trained parameters of the adapter",
        ylabel=f"held-out loss ({unit}): mean over the seeds, bar of one standard error",
        xlim=(min(row.parameters for row in found) / 1.7, max(row.parameters for row in found) * 1.9),
        ylim=(best - 0.06 * span, top + 0.08 * span),
    )
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    axes.grid(alpha=0.25)
    for text, level in levels.items():
        axes.axhline(level, color=_QUIET, linewidth=1, linestyle=":")
        axes.text(0.002, level, f" {text}", transform=axes.get_yaxis_transform(), color=_QUIET, va="bottom")
    points, bars = [], []
    for row in found:
        colour = _OURS if row.ours else _PEFT
        y = min(row.loss, top + 0.04 * span)
        axes.errorbar(
            row.parameters, y, yerr=row.error if y == row.loss else None, fmt="o" if row.ours else "s",
            color=colour, markersize=5, elinewidth=0.7, alpha=0.8,
        )  # fmt: skip
        points.append((row.parameters, y, row.setting, colour))
        bars.append((row.parameters, y - (row.error or 0), y + (row.error or 0)))
    axes.set_title(title, loc="left", fontweight="bold")
    axes.text(0.20, 1.012, "ours", color=_OURS, transform=axes.transAxes, fontweight="bold")
    axes.text(0.24, 1.012, "PEFT's own", color=_PEFT, transform=axes.transAxes, fontweight="bold")
    canvas.draw()
    _label(axes, canvas.get_renderer(), points, bars)
    figure.savefig(path, dpi=110, format="png")


def _label(
    axes: Any,
    renderer: Any,
    points: Sequence[tuple[float, float, str, str]],
    bars: Sequence[tuple[float, float, float]],
) -> None:
    """Write every name where it covers no dot, no bar and no other name, nearest place first."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    dots = [axes.transData.transform((x, y)) for x, y, *_ in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in dots]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    crossed = []
    for x, low, high in bars:
        (left, bottom), (_, top) = axes.transData.transform((x, low)), axes.transData.transform((x, high))
        crossed.append(Bbox.from_extents(left - 1, bottom, left + 1, top))
    inside = axes.get_window_extent(renderer)
    for line in axes.lines:  # levels that go all the way
        if line.get_linestyle() == ":":
            y = axes.transData.transform((1, line.get_ydata()[0]))[1]
            crossed.append(Bbox.from_extents(inside.x0, y - 1, inside.x1, y + 1))
    for (x, y, name, colour), _ in sorted(zip(points, dots, strict=True), key=lambda one: one[1][0]):
        # a bar may be crossed before a name is left out, the longer way from its dot
        for obstacles, (dx, dy) in [(crossed, place) for place in _PLACES] + [
            ((), place) for place in _PLACES
        ]:
            text = axes.annotate(
                name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8, color=colour,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center" if dy == 0 else "bottom" if dy > 0 else "top",
                arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.6, "shrinkB": 3}
                if abs(dx) + abs(dy) > 14 else None,
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # the words without their line
            words = Bbox.from_extents(box.x0 - 1, box.y0, box.x1 + 1, box.y1)
            fits = inside.contains(*words.min) and inside.contains(*words.max)
            if fits and not words.count_overlaps([*taken, *obstacles]):
                taken.append(words)
                break
            text.remove()
