"""A PNG of loss and update norms from a trainer's log history."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ndlora_plugins.errors import MissingExtraError, NdLoraValueError

__all__ = ["check_plot", "draw_history"]


def check_plot(path: str | Path) -> None:
    """Raise unless a PNG can be drawn.

    Raises:
        MissingExtraError: there is no matplotlib.
        NdLoraValueError: `path` is a directory.
    """
    if Path(path).is_dir():
        raise NdLoraValueError(
            f"plot={str(path)!r} is a directory: give the name of a file, such as loss.png."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plot= needs matplotlib: run `pip install matplotlib`.")


def draw_history(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write a PNG: above the loss against the step, below each adapter's update norms.

    Args:
        history: `state.log_history`; entries without a loss are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = [entry for entry in history if "loss" in entry]
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries])
    above.set_ylabel("loss")
    for key in sorted({key for entry in entries for key in entry if key.startswith("ndlora/")}):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        below.plot(*zip(*points, strict=True), label=key)
    if below.lines:
        below.legend()
    below.set_xlabel("step")
    below.set_ylabel("||scaling dW|| / ||W||")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
