"""What is measured: single layers of three models, their start, a training step, generation, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.speed.measure import interleaved, kept_bytes, peak_bytes, summary, timed
from benchmarks.speed.variants import BASELINE, CORES, ON_CUDA, OURS, VARIANTS, adapt
from ndlora_plugins import NdLoraConfig

__all__ = ["LAYERS", "TOKENS", "Case", "cases"]

# model -> (in_features, out_features) of its projections
LAYERS = {
    "SmolLM2-135M": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "Qwen3-1.7B": ((2048, 2048), (2048, 1024), (2048, 6144), (6144, 2048)),
    "Llama-3-8B": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}
TOKENS = (256, 1024, 4096)
_OTHERS = (BASELINE, "VeRA", "LoKr", "reference NdLinear", "NdLinear")
# of the whole models; random weights cost what trained ones cost
ARCHITECTURES = {
    "SmolLM2-135M": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
    # the vocabulary of 128256 is cut: what the embedding and the head cost is the same for every adapter
    "Llama-3-8B": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One thing to measure: its name in the results, its results, and how to get them."""

    name: str
    run: Callable[[torch.device, float], dict]


class OneLayer(nn.Module):
    """A module that adapters can be put on."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def cases(quick: bool = False, cuda: bool = False) -> Iterator[Case]:
    """All of them, or the few and small ones of a quick run.

    Args:
        cuda: whether it is for a GPU, which does what a CPU takes too long for.
    """
    for tokens in TOKENS[:1] if quick else TOKENS:
        for model, shapes in list(LAYERS.items())[: 1 if quick else None]:
            for shape in shapes[: 1 if quick else None]:
                for dtype in DTYPES:
                    yield _layer(model, *shape, tokens, dtype)
    for tokens in () if quick else TOKENS[:2]:
        for dtype in DTYPES:
            yield _layer("Llama-3-8B", 4096, 4096, tokens, dtype, 128, ("no adapter", BASELINE, *CORES))
    for size, rank in ((256, 8),) if quick else ((4096, 8), (4096, 128)):
        yield _start(size, rank)
    for dtype in DTYPES:
        for beside, variants in (("LoRA", ("no adapter", BASELINE, *OURS)), ("others", _OTHERS)):
            name = f"training step beside {beside}, SmolLM2-135M, 2 x 256 tokens, {dtype}"
            yield _step(name, "SmolLM2-135M", 1 if quick else 30, (2, 256), dtype, variants)
    if quick or cuda:
        yield from _block_stacks(*(("tiny", 1, 16) if quick else ("Llama-3-8B", 4, 2048)))
    for dtype in DTYPES:
        yield _generation(dtype, layers=1 if quick else 30, new_tokens=4 if quick else 16)
    for dtype in list(DTYPES)[: 1 if quick else None]:
        for variant in OURS[:1] if quick else (BASELINE, *OURS):
            yield _compiled(dtype, variant, layers=1 if quick else 8)


def _layer(
    model: str,
    in_features: int,
    out_features: int,
    tokens: int,
    dtype: str,
    rank: int = 8,
    chosen: tuple[str, ...] | None = None,
) -> Case:
    """A layer, forward alone and forward + backward with gradients of x and the adapter; of all variants by default."""

    def run(device: torch.device, seconds: float) -> dict:
        torch.manual_seed(0)
        base = OneLayer(in_features, out_features, DTYPES[dtype], device)
        x = torch.randn(1, tokens, in_features, device=device).to(DTYPES[dtype]).requires_grad_()
        grad = torch.randn(1, tokens, out_features, device=device).to(DTYPES[dtype])

        def both(model: nn.Module) -> None:
            x.grad = None
            model.zero_grad()
            model(x).backward(grad)

        def forward(model: nn.Module) -> None:
            with torch.no_grad():
                model(x)

        models, failed = _adapted(chosen or tuple(VARIANTS), base, ["layer"], both, device, rank)
        works = {
            f"{what.__name__} {variant}": (lambda what=what, model=model: what(model))
            for what in (both, forward)
            for variant, model in models.items()
        }
        times = interleaved(
            works, device, seconds, least=5 if tokens < 4096 else 3, turn=min(0.01, seconds / 100)
        )
        return {
            what.__name__: summary({v: times[f"{what.__name__} {v}"] for v in models}, BASELINE)
            for what in (both, forward)
        } | {
            "kept": {v: kept_bytes(model, lambda model=model: model(x)) for v, model in models.items()},
            **failed,
        }

    ranked = "" if rank == 8 else f", r={rank}"
    return Case(f"layer, {model}, {in_features} -> {out_features}, {tokens} tokens, {dtype}{ranked}", run)


def _adapted(
    variants: tuple[str, ...],
    base: nn.Module,
    targets: list[str],
    work: Callable[[nn.Module], object],
    device: torch.device,
    rank: int = 8,
) -> tuple[dict[str, nn.Module], dict[str, dict[str, str]]]:
    """The models, on a GPU with those of its kernels beside NdLinear; and {"failed": those whose `work` fails}."""
    models = {variant: adapt(variant, base, targets, rank) for variant in variants}
    failed = {}
    for variant in ON_CUDA if device.type == "cuda" and "NdLinear" in models else ():
        try:
            model = adapt(variant, base, targets, rank)
            work(model)
            models[variant] = model
        except Exception as error:  # what the kernels cannot do takes nothing from the others
            failed[variant] = f"{type(error).__name__}: {error}"[:300]
    return models, {"failed": failed} if failed else {}


def _start(size: int, rank: int) -> Case:
    """Making an adapter on one float32 layer, by get_peft_model."""
    starts = {
        "n_lora": lambda: NdLoraConfig(init_lora_weights="n_lora", r=rank, target_modules=["layer"]),
        "ndlinear": lambda: NdLoraConfig(method="ndlinear", target_modules=["layer"]),
        "LoRA": lambda: LoraConfig(r=rank, target_modules=["layer"]),
        "pissa_niter_4": lambda: LoraConfig(
            init_lora_weights="pissa_niter_4", r=rank, target_modules=["layer"]
        ),
        "pissa": lambda: LoraConfig(init_lora_weights="pissa", r=rank, target_modules=["layer"]),
    }

    def run(device: torch.device, seconds: float) -> dict:
        torch.manual_seed(0)
        found = {}
        for name, config in starts.items():
            times = []
            for _ in range(1 if name == "pissa" else 5):
                model = OneLayer(size, size, torch.float32, device)
                times.append(timed(lambda m=model, c=config: get_peft_model(m, c()), device))
            found[name] = sorted(times)[len(times) // 2] * 1e3
        return {"ms": found}

    return Case(f"start, {size} x {size}, r={rank}", run)


def _llama(architecture: str, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """So many layers of an architecture, with its embedding and head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **ARCHITECTURES[architecture],
        num_hidden_layers=layers,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    with device:
        return LlamaForCausalLM(config).to(dtype)


def _block_stacks(architecture: str, blocks: int, tokens: int) -> Iterator[Case]:
    """The training step of a few blocks of a model, under autocast as trainers do it, and without."""
    for autocast in (True, False):
        name = f"block stack, {blocks} of {architecture}, 1 x {tokens} tokens, {'autocast to ' * autocast}bfloat16"
        variants = ("no adapter", BASELINE, *OURS)
        yield _step(name, architecture, blocks, (1, tokens), "bfloat16", variants, autocast)


def _step(
    name: str,
    architecture: str,
    layers: int,
    shape: tuple[int, int],
    dtype: str,
    variants: tuple[str, ...],
    autocast: bool = False,
) -> Case:
    """Forward, backward and AdamW, adapters on all linear layers.

    Args:
        shape: sequences and their tokens.
        autocast: whether forward runs under autocast to bfloat16.
    """

    def run(device: torch.device, seconds: float) -> dict:
        base = _llama(architecture, layers, DTYPES[dtype], device)
        tokens = torch.randint(0, base.config.vocab_size, shape, device=device)
        models, failed = _adapted(variants, base, TARGETS, lambda model: loss(model).backward(), device)
        works = {}
        for variant, model in models.items():
            model.train().zero_grad()
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if not parameters:  # the embedding's output stands for what trains
                model.enable_input_require_grads()
                parameters = [nn.Parameter(torch.zeros(1, device=device))]
            optimizer = torch.optim.AdamW(parameters, lr=1e-4)
            works[variant] = lambda model=model, optimizer=optimizer: step(model, optimizer)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

        def loss(model: nn.Module) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                return model(input_ids=tokens, labels=tokens, use_cache=False).loss

        # the peak's step is the one that warms up
        peak = {variant: peak_bytes(work, device) for variant, work in works.items()}
        times = interleaved(works, device, seconds * 5, least=3, warm_up=False)
        return {
            "step": summary(times, BASELINE),
            "kept": {v: kept_bytes(model, lambda model=model: loss(model)) for v, model in models.items()},
            "peak": peak,
            **failed,
        }

    return Case(name, run)


def _generation(dtype: str, layers: int, new_tokens: int) -> Case:
    """Greedy generation with a cache, one sequence, adapters not merged."""

    def run(device: torch.device, seconds: float) -> dict:
        base = _llama("SmolLM2-135M", layers, DTYPES[dtype], device).eval()
        tokens = torch.randint(0, 49152, (1, 32), device=device)

        def generate(model: nn.Module) -> None:
            model.eval().generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

        models, failed = _adapted(("no adapter", BASELINE, *OURS), base, TARGETS, generate, device)
        works = {variant: lambda model=model: generate(model) for variant, model in models.items()}
        return {"generation": summary(interleaved(works, device, seconds * 5), BASELINE), **failed}

    return Case(f"generation, SmolLM2-135M, 32 + 16 tokens, {dtype}", run)


def _compiled(dtype: str, variant: str, layers: int, length: int = 256) -> Case:
    """Forward and backward of 2 x `length` tokens, eager and as one graph of torch.compile."""

    def run(device: torch.device, seconds: float) -> dict:
        torch.compiler.reset()  # what was compiled before counts towards a limit
        base = _llama("SmolLM2-135M", layers, DTYPES[dtype], device)
        tokens = torch.randint(0, 49152, (2, length), device=device)
        eager = adapt(variant, base, TARGETS).train()
        works = {"eager": eager, "compiled": torch.compile(eager, fullgraph=True, dynamic=False)}

        def both(model: Callable) -> None:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            eager.zero_grad()

        times = interleaved(
            {name: lambda model=model: both(model) for name, model in works.items()}, device, seconds * 5
        )
        return {"compiled": summary(times, "eager")}

    return Case(f"compiled, {layers} layers of SmolLM2-135M, 2 x {length} tokens, {variant}, {dtype}", run)
