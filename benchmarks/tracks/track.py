"""A track: an encoder that is adapted, a small head, and data; and one run on it."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.quality.settings import Setting, peft_config
from ndlora_plugins import NdLoraConfig, measure_gradients

__all__ = ["Track", "run"]

_PACKAGES = ("ndlora-plugins", "torch", "peft", "transformers")
_HEAD_RATE, _WARM_UP, _MEASURED = 1e-3, 0.1, 8


@dataclass(frozen=True)
class Track:
    """What every run of a track shares.

    Attributes:
        name: of its file among the results.
        description: what was trained and on what, as every line of results has it.
        encoder: the model that is adapted; it stays as it is.
        head: its start; trained with every adapter, at one and the same rate.
        features: (encoder, batch) -> what the head reads, (rows, features).
        loss: (the head's output, batch) -> a scalar, the mean over the rows.
        score: (the head's outputs, targets) -> what people ask for, such as the share that is right.
        batches: seed -> the training batches, one a step.
        held_out: name -> batches that are never trained on; the first is the task, the others show what carries over.
        forgotten: a head that stays, and batches for it: what the encoder knew before. None: nothing is asked.
    """

    name: str
    description: Mapping[str, Any]
    encoder: nn.Module
    head: nn.Module
    features: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    score: Callable[[Tensor, Tensor], float]
    batches: Callable[[int], Sequence[Mapping[str, Tensor]]]
    held_out: Mapping[str, Sequence[Mapping[str, Tensor]]]
    forgotten: tuple[nn.Module, Mapping[str, Sequence[Mapping[str, Tensor]]]] | None = None

    def evaluate(self, model: nn.Module, head: nn.Module) -> dict[str, tuple[float, float]]:
        """Name -> (loss, score) of every set that is never trained on."""
        found = {name: self._evaluate(model, head, batches) for name, batches in self.held_out.items()}
        if self.forgotten is not None:
            found |= {
                name: self._evaluate(model, self.forgotten[0], b) for name, b in self.forgotten[1].items()
            }
        return found

    @torch.inference_mode()
    def _evaluate(
        self, model: nn.Module, head: nn.Module, batches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[float, float]:
        outputs, losses, targets = [], [], []
        for batch in batches:
            outputs.append(head(self.features(model, batch)))
            losses.append(float(self.loss(outputs[-1], batch)) * len(outputs[-1]))
            targets.append(batch["target"])
        outputs, targets = torch.cat(outputs), torch.cat(targets)
        return sum(losses) / len(outputs), self.score(outputs, targets)


def run(track: Track, setting: Setting, learning_rate: float, seed: int) -> dict[str, Any]:
    """Attach the adapter, train it and the head, evaluate, and take it off again.

    AdamW without decay, the norm of the gradient cut at 1, a tenth of the steps to warm up, then down to zero.

    Returns:
        What a line of results holds. `held_out_loss` is None if the training diverged.
    """
    weights = {name: value.clone() for name, value in track.encoder.state_dict().items()}
    batches = track.batches(seed)
    torch.manual_seed(seed)
    head = nn.Linear(track.head.in_features, track.head.out_features)
    head.load_state_dict(track.head.state_dict())
    config = peft_config(setting, task_type="FEATURE_EXTRACTION")

    def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return track.loss(head(track.features(model, batch)), batch)

    if isinstance(config, NdLoraConfig) and "gradient" in config.resolved().start.reads:
        measure_gradients(
            track.encoder,
            config,
            lambda: [loss_of(track.encoder, batch).backward() for batch in batches[:_MEASURED]],
        )
        head.zero_grad(set_to_none=True)
    model = get_peft_model(track.encoder, config).eval()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": learning_rate}, {"params": head.parameters(), "lr": _HEAD_RATE}],
        weight_decay=0,
    )
    warm = max(1, round(_WARM_UP * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(batches) - step) / (len(batches) - warm))
    )
    seconds, diverged = [], False
    for batch in batches:
        started = time.perf_counter()
        loss = loss_of(model, batch)
        if not math.isfinite(float(loss)):
            diverged = True
            break
        loss.backward()
        nn.utils.clip_grad_norm_([*adapter, *head.parameters()], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    found = {} if diverged else track.evaluate(model, head)
    result = {
        "track": dict(track.description),
        "setting": {key: getattr(setting, key) for key in ("name", "peft_type", "options")},
        "learning_rate": learning_rate,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in adapter),
        "held_out_loss": None if diverged else _rounded(next(iter(found.values()))[0]),
        "held_out": {name: [_rounded(value) for value in pair] for name, pair in found.items()},
        "seconds_a_step": _rounded(statistics.median(seconds)) if seconds else None,
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }
    model.unload().load_state_dict(weights)  # PiSSA writes the base weight, and `unload` leaves it so
    return result


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
