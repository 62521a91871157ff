"""Every method at its default size beside LoRA r=8, on the layers of two models.

`python -m benchmarks.speed.family benchmarks/speed/results/family.json` measures; `python -m benchmarks.speed.report`
makes the table of docs/speed.md.
"""

from __future__ import annotations

import json
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import write_json
from benchmarks.speed.cases import DTYPES, LAYERS, OneLayer
from benchmarks.speed.measure import interleaved, summary
from benchmarks.speed.variants import BASELINE, VARIANTS, shake
from ndlora_plugins import NdLoraConfig
from ndlora_plugins.registry import methods

__all__ = ["family_table"]

MODELS = ("Qwen3-1.7B", "Llama-3-8B")
TOKENS = 256
BARS = {"float32": 1.05, "bfloat16": 1.00}
LEFT_OUT = ("einsum",)  # an equation has no default
# starts that cost the same in a step: without the gradients of a batch, and without a whole decomposition
FIELDS = {"lora_sb": {"init_lora_weights": "svd_step"}, "mica": {"init_lora_weights": "first_zero"}}


def main(
    results: Annotated[
        Path, typer.Argument(help="The JSON to write; layers that it has are not measured again.")
    ],
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    seconds: Annotated[
        float, typer.Option(help="At least so long a layer and dtype, with five rounds or more.")
    ] = 20,
    only: Annotated[str, typer.Option(help="Only layers whose name contains this.")] = "",
    method: Annotated[list[str] | None, typer.Option(help="Only these; again for several.")] = None,
) -> None:
    """Forward and backward of whole layers, the methods in turns, in one process."""
    from benchmarks.speed.__main__ import machine

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    found = (
        json.loads(results.read_text()) if results.exists() else {"machine": machine(device), "layers": {}}
    )
    chosen = method or [name for name in methods() if name not in LEFT_OUT]
    for model in MODELS:
        for shape in LAYERS[model]:
            for dtype in DTYPES:
                name = f"{model}, {shape[0]} -> {shape[1]}, {dtype}"
                if only in name and name not in found["layers"]:
                    found["layers"][name] = measure(chosen, *shape, DTYPES[dtype], device, seconds)
                    write_json(found, results)
                    print(name, flush=True)


def measure(
    chosen: list[str],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Method -> its time's ratio to LoRA's, as `summary` gives it."""
    from peft import get_peft_model

    torch.manual_seed(0)
    works = {}
    x = torch.randn(1, TOKENS, in_features, dtype=dtype).requires_grad_()
    grad = torch.randn(1, TOKENS, out_features, dtype=dtype)

    def both(model: torch.nn.Module) -> None:
        x.grad = None
        model.zero_grad()
        model(x).backward(grad)

    weight = OneLayer(in_features, out_features, dtype, device).layer.weight
    for name in (BASELINE, *chosen):
        layer = OneLayer(in_features, out_features, dtype, torch.device("meta"))
        layer.layer.weight = torch.nn.Parameter(weight.data)  # one for all
        if name == BASELINE:
            model = VARIANTS[BASELINE](layer, ["layer"], 8)
        else:
            config = NdLoraConfig(**{"method": name, "target_modules": ["layer"], **FIELDS.get(name, {})})
            model = get_peft_model(layer, config)
        works[name] = partial(both, shake(model))
    return summary(interleaved(works, device, seconds, turn=min(0.01, seconds / 100)), BASELINE)


def family_table(found: dict[str, Any]) -> str:
    """A line a method: mean over the layers and the worst, and whether the bar is met."""
    machine, layers = found["machine"], found["layers"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, peft {machine['peft']}; "
        f"{len(layers)} layers of {2 * sum(len(LAYERS[model]) for model in MODELS)}.\n",
        f"| method | {' | '.join(f'{dtype}, bar {bar:.2f}' for dtype, bar in BARS.items())} | |",
        f"|---|{'---|' * len(BARS)}---|",
    ]
    names = dict.fromkeys(name for layer in layers.values() for name in layer if name != BASELINE)
    for name in names:
        cells, met = [], True
        for dtype, bar in BARS.items():
            ratios = [
                layer[name]["ratio"] for key, layer in layers.items() if key.endswith(dtype) and name in layer
            ]
            if ratios:
                mean = statistics.mean(ratios)
                met = met and mean <= bar
                cells.append(f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            else:
                cells.append("")
        lines.append(f"| `{name}` | {' | '.join(cells)} | {'met' if met else '**missed**'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
