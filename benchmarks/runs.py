"""What quality and tracks have in common: settings, their runs as lines of JSON, and which run comes next."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ndlora_plugins import NdLoraConfig, measure_gradients
from ndlora_plugins.errors import NdLoraValueError

__all__ = [
    "SWEEP_SEED",
    "Run",
    "Setting",
    "append_result",
    "best_rate",
    "by_rate",
    "check_comparable",
    "loss_that_chooses",
    "make_result",
    "measure_if_read",
    "missing",
    "of_setting",
    "read_results",
    "rounded",
]

# learning rates, a factor of about 3 apart
_GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
SWEEP_SEED = 0
_CHOOSING = 3  # seeds that decide between a sweep's best rate and those beside it
_PACKAGES = ("ndlora-plugins", "torch", "peft", "transformers")


@dataclass(frozen=True)
class Setting:
    """One adapter configuration.

    Attributes:
        name: as the tables show it.
        peft_type: of PEFT's table, or "NONE": no adapter.
        options: of that type's PeftConfig.
        lowest: the lowest learning rate of the sweep's first ones; it goes on from there as the results ask.
        ratios: the end of a parameter's name to how many times the rate it learns at, where its authors say so.
        tried: how many rates the sweep begins with; of two it takes the better and goes no further.
        seeds: the first is SWEEP_SEED, the others run at the best rate.
        neighbours: whether the rates beside the best run with three seeds too, so that three choose the rate.
    """

    name: str
    peft_type: str
    options: dict[str, Any] = field(hash=False)
    lowest: float
    ratios: Mapping[str, float] = field(default_factory=dict, hash=False)
    tried: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    neighbours: bool = False

    @property
    def first_rates(self) -> tuple[float, ...]:
        """The rates that the sweep begins with."""
        start = _GRID.index(self.lowest)
        return _GRID[start : start + self.tried]

    def rate_ratio(self, parameter: str) -> float:
        """How many times the rate a parameter of this name learns at."""
        return next((ratio for part, ratio in self.ratios.items() if part in parameter), 1.0)


@dataclass(frozen=True)
class Run:
    """What identifies a run of a task."""

    setting: Setting
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.setting.name} lr {self.learning_rate:g} seed {self.seed}"


def measure_if_read(
    model: nn.Module, config: Any, loss: Callable[[Any], Tensor], batches: Sequence[Any]
) -> None:
    """Measure the gradients of the first four batches where the configuration's start reads them.

    Args:
        loss: of a batch.
    """
    if isinstance(config, NdLoraConfig) and "gradient" in config.resolved().start.reads:
        measure_gradients(model, config, lambda: [loss(batch).backward() for batch in batches[:4]])


def rounded(value: float | None) -> float | None:
    """As results have it; None for what is not finite."""
    return round(float(value), 5) if value is not None and math.isfinite(value) else None


def make_result(
    task: str, about: Mapping[str, Any], run: Run, parameters: int, found: Mapping[str, Any]
) -> dict[str, Any]:
    """One line of the results.

    Args:
        about: what was trained; only results that say the same can be compared.
        found: what was measured; `held_out_loss` is None if the training diverged.
    """
    setting = {name: getattr(run.setting, name) for name in ("name", "peft_type", "options")}
    return {
        "task": task,
        "about": dict(about),
        "setting": setting,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "parameters": parameters,
        **found,
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """Every run that is done; a last line that a kill cut short is not one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def append_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write one line more, in place of a last one that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lines:
        lines.seek(0)
        text = lines.read()
        lines.truncate(len(text[: text.rfind("\n") + 1].encode()))
        lines.write(json.dumps(result) + "\n")


def check_comparable(path: Path, about: Mapping[str, Any]) -> None:
    """Refuse a file whose runs trained something else.

    Raises:
        NdLoraValueError: naming both.
    """
    for result in read_results(path):
        if result["about"] != dict(about):
            raise NdLoraValueError(
                f"{path} holds runs of {result['about']}, which cannot be compared with {dict(about)}: choose another "
                f"folder with --results."
            )


def of_setting(results: Iterable[dict[str, Any]], setting: str) -> list[dict[str, Any]]:
    """The results of one setting."""
    return [result for result in results if result["setting"]["name"] == setting]


def loss_that_chooses(results: Iterable[Mapping[str, Any]]) -> float:
    """The mean validation loss, or held-out one of a task that has no third part; infinite if a training diverged."""
    losses = [result.get("validation_loss", result["held_out_loss"]) for result in results]
    return math.inf if None in losses else statistics.mean(losses)


def by_rate(results: Iterable[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """The runs of one setting at each learning rate, the lowest first."""
    found: dict[float, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["learning_rate"]):
        found.setdefault(result["learning_rate"], []).append(result)
    return found


def best_rate(results: Iterable[dict[str, Any]]) -> float | None:
    """The rate with the lowest loss, of those that most seeds ran at (three are most); None if all of them diverged."""
    rates = by_rate(results)
    most = min(max(map(len, rates.values()), default=0), _CHOOSING)
    tried = {rate: runs for rate, runs in rates.items() if len(runs) >= most}
    common = set.intersection(*({run["seed"] for run in runs} for runs in tried.values())) if tried else set()
    losses = {
        rate: loss_that_chooses(run for run in runs if run["seed"] in common) for rate, runs in tried.items()
    }
    best = min(losses, key=lambda rate: losses[rate], default=None)
    return best if best is not None and math.isfinite(losses[best]) else None


def missing(setting: Setting, results: Sequence[dict[str, Any]]) -> list[Run]:
    """The runs of one setting that are known to be missing; after them there may be more.

    First the sweep's rates; then one rate beyond while the best is at an edge, unless only two are tried; then more
    seeds beside the best where the setting says so; then the other seeds at the best.

    Args:
        results: of this setting.
    """
    done = {(result["learning_rate"], result["seed"]) for result in results}
    if setting.peft_type == "NONE":
        return [Run(setting, 0.0, seed) for seed in setting.seeds if (0.0, seed) not in done]
    swept = sorted({rate for rate, seed in done if seed == SWEEP_SEED})
    first = [rate for rate in setting.first_rates if rate not in swept]
    if first:
        return [Run(setting, rate, SWEEP_SEED) for rate in first]
    best = best_rate(results)
    if best is not None and (setting.tried == 2 or swept[0] < best < swept[-1]):
        at = swept.index(best)
        beside = swept[max(0, at - 1) : at + 2] if setting.neighbours else [best]
        wanted = [(rate, seed) for rate in beside for seed in setting.seeds[:_CHOOSING]]
        wanted += [(best, seed) for seed in setting.seeds[_CHOOSING:]]
        return [Run(setting, rate, seed) for rate, seed in wanted if (rate, seed) not in done]
    beyond = _GRID.index(best) + 1 if best is not None and best == swept[-1] else _GRID.index(swept[0]) - 1
    return [Run(setting, _GRID[beyond], SWEEP_SEED)] if setting.tried > 2 and 0 <= beyond < len(_GRID) else []
