"""The two ends of `make demo-axolotl`: write model and problems, then show what `axolotl train` reached.

Between the two stands Axolotl alone, with examples/axolotl/demo.yml.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ndlora_plugins.errors import NdLoraValueError

from .finetune import prepare as load_model_and_problems
from .problems import generate

__all__ = ["app", "prepare", "show"]

_TRAINING, _HELD_OUT, _SEED = 400, 48, 1
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def prepare(directory: Annotated[Path, typer.Argument(help="Where to write base/ and the two .jsonl.")]):
    """Write SmolLM2-135M-Instruct as a normal model directory, and arithmetic problems as JSONL."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, problems in (
        ("train.jsonl", generate(_TRAINING, _SEED)),
        ("held_out.jsonl", generate(_HELD_OUT, _SEED, held_out=True)),
    ):
        lines = [json.dumps(asdict(problem)) + "\n" for problem in problems]
        (directory / name).write_text("".join(lines), encoding="utf-8")
    base = directory / "base"
    if not (base / "model.safetensors").exists():
        console.print("unpacking SmolLM2-135M-Instruct (half a minute)")
        bench = load_model_and_problems(None, None, steps=1, seed=_SEED, batch_size=1, held_out=1, exact=1)
        bench.tokenizer.padding_side = "right"  # as the model's own; the plain demo pads on the left
        bench.tokenizer.save_pretrained(base)
        bench.model.save_pretrained(base)
    console.print(f"{directory}: base/, {_TRAINING} problems to train on, {_HELD_OUT} held out")


@app.command()
def show(output: Annotated[Path, typer.Argument(help="The output_dir of the training.")]):
    """Show the held-out loss before and after, and what the adapter weighs."""
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    if not states:
        raise NdLoraValueError(f"{output} has no checkpoint-*/trainer_state.json: set save_strategy: steps.")
    state = json.loads(states[-1].read_text(encoding="utf-8"))
    evaluated = [entry for entry in state["log_history"] if "eval_loss" in entry]
    before, after = evaluated[0], evaluated[-1]
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    size = (output / "adapter_model.safetensors").stat().st_size
    table = Table("method", "steps", "held-out loss before", "after", "adapter file", title="axolotl train")
    table.add_row(
        config["method"],
        str(state["global_step"]),
        f"{before['eval_loss']:.3f} (step {before['step']})",
        f"{after['eval_loss']:.3f} (step {after['step']})",
        f"{size / 1e3:,.0f} kB",
    )
    console.print(table)
    if after["eval_loss"] >= before["eval_loss"]:
        losses = f"{before['eval_loss']} to {after['eval_loss']}"
        raise NdLoraValueError(f"The held-out loss did not fall: {losses}.")


if __name__ == "__main__":
    app()
