"""What every benchmark needs: JSON files that are whole, the peak of memory, a mean's error."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["begin_peak", "peak_memory", "standard_error", "write_json"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def write_json(value: Any, path: Path) -> None:
    """Write beside, then move into place: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def begin_peak(device: torch.device) -> int | None:
    """Let the peak of memory begin anew; the bytes in use now, see `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or not allowed
        return None
    return _status("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """Bytes since `begin_peak`: of the GPU, else resident ones of the whole process (Linux only, elsewhere None)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if _CLEAR.exists() else None


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
