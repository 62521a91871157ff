"""One run on a track: attach an adapter, train it with the head, evaluate."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.runs import Run, Setting, make_result, measure_if_read, rounded
from benchmarks.tracks.settings import peft_config

__all__ = ["HEAD_RATE", "Track", "linear_layers", "measured", "run"]

HEAD_RATE = 1e-2  # of the head, the same for every setting: only the adapter's rate is swept


class Track(Protocol):
    """A frozen model with a new head, and what it learns.

    Attributes:
        name: of its file of results.
        about: what was trained, as every line of the results has it.
        model: `blocks` are adapted, `head` is trained beside every adapter and is not counted.
    """

    name: str
    about: dict[str, Any]
    model: nn.Module

    def batches(self, seed: int) -> Sequence[Any]:
        """What one run trains on, in order."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean over the batch."""

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """`validation_loss` chooses the rate, `held_out_loss` is reported; with whatever else the track measures."""


def linear_layers(model: nn.Module) -> list[str]:
    """The names of all linear layers among the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]


def run(track: Track, wanted: Run) -> dict[str, Any]:
    """Train and evaluate one setting at one rate with one seed.

    Returns:
        One line of the results. The losses are None where the training diverged.
    """
    started = time.perf_counter()
    torch.manual_seed(wanted.seed)
    base = copy.deepcopy(track.model)
    batches = track.batches(wanted.seed)
    nn.init.normal_(base.head.weight, std=0.02)
    model, adapter = _attach(track, base, wanted.setting, batches)
    finite = _train(track, model, adapter, list(base.head.parameters()), batches, wanted)
    model.eval()
    with torch.inference_mode():
        found = track.evaluate(model) if finite else {"validation_loss": None, "held_out_loss": None}
    parameters = sum(parameter.numel() for _, parameter in adapter)
    return make_result(track.name, track.about, wanted, parameters, measured(found, started))


def measured(found: Mapping[str, float | None], started: float) -> dict[str, float | None]:
    """What was measured, rounded, with the seconds since `started`; None for what is not finite."""
    seconds = round(time.perf_counter() - started, 2)
    return {name: rounded(value) for name, value in found.items()} | {"seconds": seconds}


def _attach(
    track: Track, base: nn.Module, setting: Setting, batches: Sequence[Any]
) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
    """The model with its adapter, and the adapter's parameters that train, by name."""
    base.requires_grad_(False)
    config = peft_config(setting, base, linear_layers(base))
    model = base
    if config is not None:
        measure_if_read(base, config, lambda batch: track.loss(base, batch), batches)
        model = get_peft_model(base, config)
        for parameter in base.head.parameters():
            parameter.requires_grad_(False)
    adapter = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    base.head.requires_grad_(True)
    return model, adapter


def _train(
    track: Track,
    model: nn.Module,
    adapter: Iterable[tuple[str, nn.Parameter]],
    head: list[nn.Parameter],
    batches: Sequence[Any],
    wanted: Run,
) -> bool:
    """AdamW, warm-up over a tenth of the steps, then linear decay; False if it diverged."""
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in adapter:
        rates.setdefault(wanted.learning_rate * wanted.setting.rate_ratio(name), []).append(parameter)
    groups = [
        {"params": head, "lr": HEAD_RATE},
        *({"params": some, "lr": rate} for rate, some in rates.items()),
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps, warm_up = len(batches), max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    model.eval()  # no dropout: a short training, and the same batches for all
    for batch in batches:
        loss = track.loss(model, batch)
        if not math.isfinite(loss.item()):
            return False
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return True
