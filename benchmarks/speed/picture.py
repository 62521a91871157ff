"""The picture of a run of the benchmark: time against tokens."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.speed.bars import LAYER
from benchmarks.speed.cases import DTYPES, LAYERS
from benchmarks.speed.variants import ON_CUDA, OURS, VARIANTS

__all__ = ["draw"]


def draw(found: dict, path: Path) -> None:
    """Ratio to LoRA against tokens, one line a variant, mean over the shapes; a panel for model and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(DTYPES), len(LAYERS), figsize=(13, 7), sharex=True, layout="constrained", squeeze=False
    )
    colours = dict(zip(VARIANTS, plt.get_cmap("tab20").colors, strict=False)) | dict.fromkeys(
        ON_CUDA, "black"
    )
    for row, dtype in zip(panels, DTYPES, strict=True):
        for panel, model in zip(row, LAYERS, strict=True):
            points: dict[str, dict[int, list[float]]] = {}
            for name, case in found["cases"].items():
                match = LAYER.fullmatch(name)
                if match and (match["model"], match["dtype"], match["rank"]) == (model, dtype, None):
                    for variant, figures in case["both"].items():
                        points.setdefault(variant, {}).setdefault(int(match["tokens"]), []).append(
                            figures["ratio"]
                        )
            for variant, values in points.items():
                tokens = sorted(values)
                panel.plot(
                    tokens,
                    [statistics.mean(values[count]) for count in tokens],
                    marker="o",
                    label=variant,
                    color=colours[variant],
                    linewidth=2.5 if variant in OURS else 1,
                    linestyle="-" if variant in OURS else "--",
                )
            panel.set_title(f"{model}, {dtype}")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.grid(alpha=0.3)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.supxlabel("tokens")
    figure.supylabel("time of forward + backward of the whole layer, ratio to LoRA r=8")
    handles = {}
    for panel in panels.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)
