"""What the demo found: as files, and on the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["DemoReport", "MethodResult", "show", "write_files"]


@dataclass
class MethodResult:
    """What one method reached. Losses are nats a token of the answer, exact match is a share of 0 to 1."""

    method: str
    rank: int
    learning_rate: float
    trainable_parameters: int
    bytes_on_disk: int  # the adapter's weights and its configuration
    held_out_loss_before: float
    held_out_loss_after: float
    exact_match_before: float
    exact_match_after: float
    seconds_a_step: float
    answer: str  # of the trained model, to the first held-out problem
    losses: list[float] = field(repr=False)  # training loss, one a step
    reloaded_answer: str | None = None  # of the saved adapter in a fresh process, to the same problem


@dataclass
class DemoReport:
    """All results of a run; ``failures`` has one sentence for each check that did not hold."""

    model: str
    data: str
    steps: int
    seed: int
    results: list[MethodResult]
    failures: list[str]


_COLUMNS = (
    "method",
    "trainable parameters",
    "bytes on disk",
    "held-out loss before",
    "held-out loss after",
    "exact match before",
    "exact match after",
    "seconds a step",
)


def _cells(result: MethodResult) -> list[str]:
    return [
        f"{result.method} r={result.rank}",
        f"{result.trainable_parameters:,}",
        f"{result.bytes_on_disk:,}",
        f"{result.held_out_loss_before:.3f}",
        f"{result.held_out_loss_after:.3f}",
        f"{result.exact_match_before:.0%}",
        f"{result.exact_match_after:.0%}",
        f"{result.seconds_a_step:.2f}",
    ]


def write_files(report: DemoReport, output: Path) -> None:
    """results.json, results.md and loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (output / "results.json").write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    rows = [_COLUMNS, ["---"] + ["---:"] * (len(_COLUMNS) - 1), *map(_cells, report.results)]
    lines = ["| " + " | ".join(row) + " |\n" for row in rows]
    (output / "results.md").write_text("".join(lines), encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for result in report.results:
        axes.plot(
            range(1, len(result.losses) + 1),
            result.losses,
            linewidth=1.5,
            label=f"{result.method} r={result.rank}: {result.trainable_parameters:,} parameters",
        )
    axes.set(
        xlabel="training step",
        ylabel="training loss (nats per answer token)",
        yscale="log",
        title=f"{report.model}: loss while fine-tuning",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportCallIssue]  a MaxNLocator
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(output / "loss.png", dpi=120)
    pyplot.close(figure)


def show(report: DemoReport, output: Path, console: Console) -> None:
    """Print the answers side by side, the table, and what failed."""
    answers = Table(
        "method",
        "the trained model",
        "the saved adapter in a fresh process",
        show_lines=True,
        title="Answers to one held-out problem",
    )
    for result in report.results:
        reloaded = "(none)" if result.reloaded_answer is None else result.reloaded_answer.strip()
        answers.add_row(result.method, escape(result.answer.strip()), escape(reloaded))
    table = Table(title=f"{escape(report.model)}, {escape(report.data)}, {report.steps} steps each")
    for number, column in enumerate(_COLUMNS):
        table.add_column(
            column,
            justify="right" if number else "left",
            no_wrap=not number,
            overflow="fold",
            min_width=10 if number == 1 else None,
        )
    for result in report.results:
        table.add_row(*_cells(result))
    console.print(answers, table)
    for failure in report.failures:
        console.print(f"[red]failed:[/red] {escape(failure)}")
    if not report.failures:
        console.print(
            "Each saved adapter gives the same answer in a fresh process that knows PEFT alone, "
            "and the base model's weights are bit for bit what they were."
        )
    console.print(
        f"In {escape(str(output))}: loss.png (loss curves), results.md, results.json, and a folder "
        f"for each adapter; reload.py there loads them."
    )
