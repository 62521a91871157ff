"""How things are measured: time, bytes kept for backward, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.common import begin_peak, peak_memory

__all__ = ["interleaved", "kept_bytes", "peak_bytes", "summary", "timed"]


def interleaved(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least: int = 5,
    most: int = 200,
    warm_up: bool = True,
    turn: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds a call of each work, round after round, a turn each: what disturbs one disturbs its neighbour.

    Args:
        seconds: at least so long in all, with at least `least` and at most `most` rounds.
        warm_up: whether to call every work once before.
        turn: at least so many seconds a turn, of as many calls as it takes, the same for every work. A model calls
            layers of a kind one after the other; a single call between others' finds nothing of its own in cache.
    """

    if warm_up:
        for work in works.values():
            work()
    calls = math.ceil(turn / min(timed(work, device) for work in works.values())) if turn else 1
    times: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (time.perf_counter() < end and rounds < most):
        for name, work in works.items():
            times[name].append(timed(work, device, calls))
        rounds += 1
    return times


def timed(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds a call, until the device has done its work too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def summary(times: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """For each work the median in ms, and the ratio to the baseline of the same round: median and quartiles."""
    found = {}
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, times[baseline], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[name] = {
            "ms": round(statistics.median(values) * 1e3, 4),
            "ratio": round(median, 4),
            "ratio_low": round(low, 4),
            "ratio_high": round(high, 4),
            "rounds": len(values),
        }
    return found


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a forward keeps for backward: distinct storages, the model's own tensors left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # alive until the sum: no address is used twice
    del result
    return sum(kept.values())


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises while `work` runs, of what `peak_memory` counts."""
    if device.type == "cuda":
        work()  # what is made once and stays: the workspace of its products, the optimizer's state
    gc.collect()
    if device.type == "cpu":
        with contextlib.suppress(
            OSError, AttributeError
        ):  # glibc only; or memory that was freed before counts as there
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = begin_peak(device)
    work()
    peak = peak_memory(device)
    return None if before is None or peak is None else peak - before
