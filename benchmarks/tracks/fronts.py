"""The README's picture: at each budget the best of ours beside the best of PEFT's, on every track."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.tracks.rows import BASELINE, BUDGETS, NOTHING, TrackRow, best_within

__all__ = ["draw_fronts"]

_COLOURS = {True: "tab:blue", False: "tab:orange"}
_NAMES = {True: "ours", False: "PEFT's methods"}


def draw_fronts(tracks: Mapping[str, Sequence[TrackRow]], path: Path) -> None:
    """A PNG: a panel for each track."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    for axes, (track, found) in zip(
        figure.subplots(1, len(tracks), squeeze=False)[0], tracks.items(), strict=True
    ):
        level = {row.setting: row.loss for row in found if row.setting in (BASELINE, NOTHING)}
        whole = next(row.parameters for row in found if row.setting == BASELINE)
        gain = level[NOTHING] - level[BASELINE]
        for ours in (False, True):
            chosen = [
                best_within([row for row in found if row.ours == ours], whole / part) for part in BUDGETS
            ]
            points = [(1 / part, row) for part, row in zip(BUDGETS, chosen, strict=True) if row is not None]
            kept = [(level[NOTHING] - row.loss) / gain for _, row in points]
            axes.errorbar(
                [at * (1.03 if ours else 0.97) for at, _ in points], kept,
                yerr=[(row.error or 0) / gain for _, row in points], color=_COLOURS[ours],
                marker="o" if ours else "s", markersize=4, linewidth=1.2, elinewidth=0.7,
            )  # fmt: skip
            axes.text(
                0.98,
                0.06 + 0.08 * ours,
                _NAMES[ours],
                color=_COLOURS[ours],
                ha="right",
                transform=axes.transAxes,
            )
        axes.axhline(1, color="0.45", linewidth=1, linestyle=":")
        axes.text(1 / BUDGETS[0], 1.01, "LoRA r=8", color="0.45", va="bottom")
        axes.set(xscale="log", title=track, xlabel="trained parameters, of LoRA r=8's", ylim=(0, None))
        axes.set_xticks([1 / part for part in BUDGETS], [f"1/{part}" for part in BUDGETS])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
    figure.axes[0].set_ylabel("of LoRA r=8's gain")
    figure.savefig(path, dpi=110, format="png")
