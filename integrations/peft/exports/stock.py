"""An NDLORA adapter's layers as those of PEFT's own LoRA and LoKr."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoKrConfig, LoraConfig
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ndlora_plugins.errors import NdLoraValueError

from ..configuration.config import NdLoraConfig
from ..files.adapter import AdapterReader, ReadLayer
from ..files.base import BaseFiles
from ..files.format import KEY_PREFIX
from ..layers.weights import WeightForm
from .compress import RankTarget, low_rank_form, relative_error

__all__ = [
    "VLLM_RANKS",
    "ExportedLayer",
    "StockAdapter",
    "lora_config",
    "lora_pair",
    "to_lokr",
    "to_lora",
    "to_lycoris",
]

# what --max-lora-rank takes: vllm/config/lora.py, MaxLoRARanks
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an export.

    Attributes:
        form: what it became, such as "rank 8" or "8x8, 16x16" (out x in).
        parameters: numbers written for it (of the base layer's weight, where merged).
        error: ||written - dW|| / ||dW|| (Frobenius), roundings included; for "merged" what the rounding of
            the merged weight to the base's dtype leaves out.
    """

    name: str
    form: str
    parameters: int
    error: float


class StockAdapter(NamedTuple):
    """An adapter as PEFT's `save_pretrained` would write it: configuration and file, and the layers for a report."""

    config: LoraConfig | LoKrConfig
    tensors: dict[str, Tensor]
    layers: tuple[ExportedLayer, ...]


def to_lora(
    reader: AdapterReader,
    files: BaseFiles | None,
    target: RankTarget | None,
    dtype: torch.dtype | None,
    *,
    any_size: bool = False,
) -> StockAdapter:
    """A LoRA whose scaling is 1 in every layer; `r` is the largest rank, which is what servers ask for.

    Args:
        files: the base model, needed where `reader.reads_base`.
        target: how the ranks are chosen; None for the exact form.
        dtype: of the tensors; each layer's own by default.
        any_size: also one that is larger than the layers' weights, or of a rank that vLLM does not serve.
    """
    tensors, ranks, layers, weights = reader.other_tensors(), {}, [], 0
    parameters: dict[str, tuple[str, Tensor, Tensor]] = {}
    for path, layer in _layers(reader, files, all_kinds=True):
        kept = dtype or next(iter(layer.trained.values())).dtype
        try:
            down, up = low_rank_form(layer.plan, layer.trained, layer.frozen, target)
        except NdLoraValueError as error:
            raise NdLoraValueError(
                f"Layer {layer.name!r} cannot become LoRA: {error} (--rank, --energy, --max-error)"
            ) from error
        down, up = down.to(kept).contiguous(), (layer.plan.scaling * up).to(kept).contiguous()
        _check_finite(layer.name, down, up)
        weights += down.shape[1] * len(up)
        if reader.is_parameter(path):
            parameters[layer.name] = path, down, up
        else:
            tensors |= lora_pair(layer.name, reader.form(path), down, up)
        ranks[layer.name] = len(down)
        error = relative_error(layer.plan, layer.trained, layer.frozen, down, up, layer.plan.scaling)
        layers.append(ExportedLayer(layer.name, f"rank {len(down)}", down.numel() + up.numel(), error))
    largest = max(ranks.values())
    if not any_size:
        _check_size(layers, largest, weights)
    for name, (path, down, up) in parameters.items():
        shape = reader.known_form(path).shape
        tensors |= _expert_pair(path, shape, down, up, largest, _is_transposed(name, shape, files))
        ranks[name] = largest  # filled up: PEFT tells a module's parameters apart by no pattern
    modules = ranks.keys() - parameters.keys()
    transposed = files is not None and any(isinstance(files.module(name), Conv1D) for name in modules)
    config = lora_config(reader.config, ranks, transposed)
    if parameters:
        config.target_modules = sorted(modules)
        config.target_parameters = sorted(parameters)
        config.lora_dropout = 0.0  # PEFT has none on parameters
    return StockAdapter(config, tensors, tuple(layers))


def lora_config(config: NdLoraConfig, ranks: Mapping[str, int], fan_in_fan_out: bool) -> LoraConfig:
    """LoRA's configuration of layers whose scalings are 1: layer's name -> rank; `r` is the largest."""
    largest = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=config.lora_dropout,
        bias="lora_only" if config.bias == "ndlora_only" else config.bias,
        fan_in_fan_out=fan_in_fan_out,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=bool(config.ensure_weight_tying),
        **_common_fields(config, ranks),
    )


def _check_size(layers: Sequence[ExportedLayer], largest: int, weights: int) -> None:
    """Refuse what is larger than the weights that it changes, or what vLLM would not load."""
    numbers = sum(layer.parameters for layer in layers)
    if numbers > weights:
        what = f"{numbers:,} numbers, and the weights of its layers are {weights:,}"
    elif largest > VLLM_RANKS[-1]:
        what = f"rank {largest}, and vLLM serves {VLLM_RANKS[-1]} at most"
    else:
        return
    raise NdLoraValueError(
        f"The LoRA would be of {what}. Choose a smaller one (--rank, --energy, --max-error), export to='merged', or "
        f"to='lokr' where each layer is one Kronecker product; any_size (--any-size) writes it all the same."
    )


def _expert_pair(
    path: str, shape: tuple[int, ...], down: Tensor, up: Tensor, rank: int, transposed: bool
) -> dict[str, Tensor]:
    """The two tensors of a bare parameter (experts, a, b) or (a, b), whose experts share `down`, of a larger rank.

    Source: PEFT's lora.layer.ParamWrapper, `get_delta_weight`: lora_A is (experts x rank, in), lora_B (out, rank x
    experts), and `a` is the side of the outputs unless the module says `is_transposed`.
    """
    experts = shape[0] if len(shape) == 3 else 1
    # (rank, b), (experts * a, rank) -> (experts, rank, b), (experts, a, rank)
    down = nn.functional.pad(down, (0, 0, 0, rank - len(down))).expand(experts, -1, -1)
    up = nn.functional.pad(up, (0, rank - up.shape[1])).reshape(experts, -1, rank)
    if transposed:
        down, up = up.transpose(1, 2), down.transpose(1, 2)
    return {
        f"{KEY_PREFIX}{path}.lora_A.weight": down.reshape(-1, down.shape[-1]).contiguous(),
        f"{KEY_PREFIX}{path}.lora_B.weight": up.permute(1, 2, 0).reshape(up.shape[1], -1).contiguous(),
    }


def _is_transposed(name: str, shape: tuple[int, ...], files: BaseFiles | None) -> bool:
    if files is None:
        raise NdLoraValueError(
            f"{name!r} is a bare parameter, and the adapter does not say which side its inputs are on: name the base "
            f"model (--base)."
        )
    return len(shape) == 3 and getattr(files.module(name.rpartition(".")[0]), "is_transposed", False)


def lora_pair(name: str, form: WeightForm | None, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The two tensors of a layer, of a convolution as two convolutions: its own kernel to k channels, then 1 x 1."""
    if form is not None and form.kind == "convolution":
        # (k, in * height * width) -> (k, in, height, width); (out, k) -> (out, k, 1, 1)
        down, up = down.reshape(-1, *form.shape[1:]), up.reshape(*up.shape, *[1] * len(form.trailing))
    return {f"{KEY_PREFIX}{name}.lora_A.weight": down, f"{KEY_PREFIX}{name}.lora_B.weight": up}


def to_lokr(reader: AdapterReader, files: BaseFiles | None, dtype: torch.dtype | None) -> StockAdapter:
    """LoKr with both factors whole: r is so large that PEFT splits neither, and alpha = r makes its scaling 1."""
    config = reader.config
    for field in ("trainable_token_indices", "bias"):
        if getattr(config, field) not in (None, "none"):
            raise NdLoraValueError(
                f"The adapter has {field}={getattr(config, field)!r}, which LoKr cannot carry: export "
                f"to='lora' or 'merged' instead."
            )
    tensors, layers, modes = reader.other_tensors(), [], {}
    for _, layer in _layers(reader, files):
        exact = _kronecker_pair(layer, files)
        kept = dtype or next(iter(layer.trained.values())).dtype
        first, second = (matrix.to(kept).contiguous() for matrix in exact)
        _check_finite(layer.name, first, second)
        tensors[f"{KEY_PREFIX}{layer.name}.lokr_w1"] = first
        tensors[f"{KEY_PREFIX}{layer.name}.lokr_w2"] = second
        # out and in modes
        modes[layer.name] = tuple(zip(first.shape, second.shape, strict=True))
        form = ", ".join(f"{len(factor)}x{factor.shape[1]}" for factor in (first, second))
        numbers, error = first.numel() + second.numel(), _lokr_error(exact, first, second)
        layers.append(ExportedLayer(layer.name, form, numbers, error))
    largest = max(side[1] for sides in modes.values() for side in sides)
    rank = (largest + 1) // 2
    lokr = LoKrConfig(
        r=rank, alpha=rank, decompose_factor=_decompose_factor(modes), **_common_fields(config, modes)
    )
    return StockAdapter(lokr, tensors, tuple(layers))


def to_lycoris(stock: StockAdapter) -> dict[str, Tensor]:
    """A LoKr's tensors under the names of the image tools: `lora_unet_NAME.lokr_w1`, dots as underscores.

    Source: KohakuBlueleaf/LyCORIS, lycoris/modules/lokr.py; whole factors have the scale 1, whatever their alpha.

    Raises:
        NdLoraValueError: the adapter holds more than LoKr's factors.
    """
    tensors = {}
    for key, value in stock.tensors.items():
        layer, _, factor = key.removeprefix(KEY_PREFIX).rpartition(".")
        if factor not in ("lokr_w1", "lokr_w2"):
            raise NdLoraValueError(
                f"The adapter holds {key!r}, which LyCORIS has no name for: export to='merged' instead."
            )
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{name}.{factor}": value, f"{name}.alpha": torch.tensor(1.0)}
    return tensors


def _kronecker_pair(layer: ReadLayer, files: BaseFiles | None) -> tuple[Tensor, Tensor]:
    """The two matrices, in float64, of which one layer's scaled update is the Kronecker product.

    Raises:
        NdLoraValueError: it is no such product, or not on an nn.Linear.
    """
    structure, factors = layer.plan.update(layer.trained, layer.frozen)
    matrices = structure.kronecker_matrices(factors)
    reason = None
    if not structure.mode_sizes:
        reason = f"method={layer.plan.method.name!r} is no Kronecker product; to='lora' is exact for it"
    elif matrices is None and layer.plan.anchor == "snapshot":
        reason = "anchor='snapshot' makes it the sum of several Kronecker products, and LoKr has one"
    elif matrices is None:
        reason = f"r={layer.plan.layout.rank} Kronecker terms, and LoKr has one"
    elif len(matrices) != 2:
        reason = f"{len(matrices)} modes, and LoKr has two"
    elif files is not None and isinstance(files.module(layer.name), Conv1D):
        reason = "it is a Conv1D, and PEFT's LoKr adapts nn.Linear only"
    if reason is not None or matrices is None:
        raise NdLoraValueError(
            f"Layer {layer.name!r} cannot become LoKr: {reason}. Export to='lora' or 'merged'; docs/support.md "
            f"says of which method one term of two modes becomes one."
        )
    first, second = (matrix.double() for matrix in matrices)
    return layer.plan.scaling * first, second


def _decompose_factor(modes: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> int:
    """The LoKr option that splits every layer as it is split here."""
    sides = [(name, side) for name, both in modes.items() for side in both]
    wrong = {}
    for factor in dict.fromkeys([-1, *(side[0] for _, side in sides)]):
        wrong[factor] = next(
            (at for at in sides if factorization(at[1][0] * at[1][1], factor) != at[1]), None
        )
        if wrong[factor] is None:
            return factor
    name, side = wrong[-1]
    raise NdLoraValueError(
        f"Layer {name!r} has the modes {list(side)}; LoKr has one decompose_factor for all layers, and "
        f"none gives the modes of each. Export to='lora' or 'merged'."
    )


def _lokr_error(exact: tuple[Tensor, Tensor], first: Tensor, second: Tensor) -> float:
    norm = float(exact[0].norm() * exact[1].norm())
    # kron(a', b') - kron(a, b) = kron(a' - a, b') + kron(a, b' - b)
    lost = float(
        (first - exact[0]).norm() * second.double().norm() + exact[0].norm() * (second - exact[1]).norm()
    )
    return lost / norm if norm else 0.0


def _layers(
    reader: AdapterReader, files: BaseFiles | None, *, all_kinds: bool = False
) -> Iterable[tuple[str, ReadLayer]]:
    """All of them with their paths, one at a time; each is planned, and so checked, before the first is computed.

    Args:
        all_kinds: whether convolutions and bare parameters are taken too.
    """
    source = files if reader.reads_base else None  # else planned by its own tensors
    for path in reader.shapes:
        reader.plan(path, source)
        form, name = reader.form(path), reader.name(path)
        kind = "linear" if form is None else form.kind
        if kind == "convolution" and all_kinds:
            _check_ungrouped(name, files)
        elif form is not None and kind == "parameter" and all_kinds:
            _is_transposed(name, form.shape, files)
        elif kind != "linear":
            raise NdLoraValueError(
                f"{name!r} is a {kind}: LoRA is written of linear layers, convolutions and bare parameters, other "
                f"stock adapters of linear layers only. Export to='merged', or load the model with its adapter and "
                f"call merge_and_unload()."
            )
    return ((path, reader.read(path, source)) for path in reader.shapes)


def _check_ungrouped(name: str, files: BaseFiles | None) -> None:
    """PEFT splits a LoRA of a grouped convolution another way, and only the base model knows its groups."""
    if files is None:
        raise NdLoraValueError(
            f"{name!r} is a convolution, and the adapter does not say whether it has groups: name the base model "
            f"(--base)."
        )
    groups = getattr(files.module(name), "groups", 1)
    if groups != 1:
        raise NdLoraValueError(
            f"{name!r} is a convolution of {groups} groups, which LoRA reads another way. Export to='merged'."
        )


def _common_fields(config: NdLoraConfig, layers: Iterable[str]) -> dict:
    return {
        # whole names: what the adapter was given may match more, or other, layers
        "target_modules": sorted(layers),
        "modules_to_save": config.modules_to_save,
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
    }


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NdLoraValueError(
            f"The exported tensors of layer {name!r} hold NaN or infinity: the adapter is broken, or dtype "
            f"{tensors[0].dtype} too narrow for it. `ndlora check` says more."
        )
