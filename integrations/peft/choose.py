"""The adapter for a budget: method, options and learning rate, by what the tracks of the benchmark measured."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any

from torch import nn

from ndlora_plugins.budget import Budget, make_budget
from ndlora_plugins.errors import NdLoraValueError

from .configuration.config import NdLoraConfig
from .tuner.targets import plan_model

__all__ = ["BYTES_A_NUMBER", "Choice", "choose_adapter", "fields_within", "lora_parameters", "parse_number"]

logger = logging.getLogger(__name__)

BYTES_A_NUMBER = 4  # PEFT trains and saves adapters in float32
_LORA_RANK = 8  # what the tracks compare with
_FULL = 0.98  # a budget is used up from here on
_NEAR = 1.5  # so far beyond the sizes that a track had a method is still trusted
_MOST = 4096  # no rank is tried beyond
_COSTLIEST = 128  # nothing is chosen whose update takes more multiply-adds than LoRA of this rank
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
# fields that say which layers; a budget says the others of `_CHOSEN`
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
_CHOSEN = ("method", "r", "lora_alpha", "init_lora_weights", "anchor", "options", "num_modes", "crossed_modes", "modes",
           "rank_pattern", "alpha_pattern", "use_rslora")  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """An adapter to train, and what is known of it.

    Attributes:
        options: of `NdLoraConfig`, those that are not its defaults.
        learning_rate: to begin with.
        budget: what it costs, layer by layer.
        kept: track to the share of LoRA r=8's gain that this method keeps at this size.
        measured: whether the tracks had about this size; else `kept` is of their nearest.
    """

    options: Mapping[str, Any]
    learning_rate: float
    budget: Budget
    kept: Mapping[str, float]
    measured: bool

    @property
    def config(self) -> NdLoraConfig:
        """A new configuration."""
        return NdLoraConfig(**self.options)

    @property
    def python(self) -> str:
        """A line for Python."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items()).replace("'", '"')
        return f"NdLoraConfig({options})  # learning_rate={self.learning_rate:g}"

    @property
    def yaml(self) -> str:
        """The same for a YAML of `ndlora sft`, TRL's keys and ours."""
        lines = [f"learning_rate: {self.learning_rate:g}", "ndlora:"]
        return "\n".join(
            [*lines, *(f"  {name}: {json.dumps(value)}" for name, value in self.options.items())]
        )


def lora_parameters(model: nn.Module, rank: int, **targets: Any) -> int:
    """The parameters that plain LoRA has on the layers that would be adapted.

    Args:
        targets: `target_modules` and other fields of NdLoraConfig that say which layers.
    """
    return make_budget(_plan(model, NdLoraConfig(**targets)), rank).lora_parameters


def choose_adapter(
    model: nn.Module,
    *,
    parameters: int | None = None,
    file_bytes: int | None = None,
    lora_rate: float = 2e-4,
    **targets: Any,
) -> Choice:
    """The best known adapter of at most so many trained parameters, or of so large a file.

    Of what the tracks measured, the method that keeps most of LoRA r=8's gain at that size is taken, if it can use 98%
    of the budget. To get there some layers have one rank more. Nothing is chosen that takes more multiply-adds than
    LoRA of rank 128: some methods get more from a number than others by computing more with it.

    Args:
        model: may lie on the "meta" device.
        parameters, file_bytes: the budget; exactly one of them. The bytes are those of the tensors in float32.
        lora_rate: the learning rate that you would give LoRA r=8; what is proposed is that times what the tracks found.
        targets: `target_modules` and other fields of NdLoraConfig that say which layers.

    Raises:
        NdLoraValueError: no budget or two, one that no method fits into, or a rate that is none.
    """
    if parameters is not None and file_bytes is None:
        limit, size = parameters, _trained
    elif file_bytes is not None and parameters is None:
        limit, size = file_bytes // BYTES_A_NUMBER, _saved
    else:
        raise NdLoraValueError("Give exactly one budget: parameters, or the bytes of the file.")
    if not 0 < lora_rate < 1:
        raise NdLoraValueError(
            f"lora_rate={lora_rate!r}: give a learning rate between 0 and 1, such as 2e-4."
        )
    lora = lora_parameters(model, _LORA_RANK, **targets)
    best: Choice | None = None
    for family in _by_worth(limit / lora):
        made = _largest(model, {**family["options"], **targets}, limit, size)
        if made is None:
            continue
        budget = make_budget(_plan(model, NdLoraConfig(**made)), _LORA_RANK)
        kept, ratio, measured = _known(family["points"], budget.parameters / lora)
        choice = Choice(made, _round(lora_rate * ratio), budget, kept, measured)
        if size(budget) >= _FULL * limit:
            return choice
        best = best or choice
    if best is None:
        least = min(_smallest(model, {**f["options"], **targets}, size) for f in _families())
        raise NdLoraValueError(
            f"No method fits into {limit:,} numbers on this model: the smallest has {least:,}. Raise the budget, or "
            f"name fewer target_modules."
        )
    return best


def _by_worth(fraction: float) -> list[dict[str, Any]]:
    """What the tracks had, best first for a budget of so large a part of LoRA r=8's parameters.

    A track that a method was not on counts as if it had been the worst there.
    """
    known = [(family, *_known(family["points"], fraction)) for family in _families()]
    worst: dict[str, float] = {}
    for _, kept, _, _ in known:
        for track, share in kept.items():
            worst[track] = min(share, worst.get(track, share))

    def worth(one: tuple) -> tuple[bool, float]:
        _, kept, _, measured = one
        return measured, sum(kept.get(track, least) for track, least in worst.items())

    return [one[0] for one in sorted(known, key=worth, reverse=True)]


def parse_number(text: str, unit: str = "") -> int:
    """`1M`, `250k`, `1.5M`, `1_000_000`.

    Args:
        unit: what may stand behind it, as the B of `2MB`.

    Raises:
        NdLoraValueError: anything else, or nothing left.
    """
    match = re.fullmatch(r"([\d_,.]+)\s*([kMGB]?)", text.strip().removesuffix(unit))
    try:
        number = int(Fraction(match[1].replace(",", "").replace("_", "")) * _UNITS[match[2]]) if match else 0
    except ValueError:
        number = 0
    if number < 1:
        raise NdLoraValueError(f"{text!r}: write a number such as 1000000, 250k or 1.5M.")
    return number


def fields_within(
    parameters: int | str, fields: Mapping[str, Any], model: nn.Module | None = None
) -> dict[str, Any]:
    """A host's `parameters:`: the other fields of `NdLoraConfig`, with what the budget chooses.

    Args:
        parameters: a number, or a text such as "1M".
        fields: what else was written.
        model: None only checks.

    Raises:
        NdLoraValueError: no number, a field that the budget is to choose, or nothing fits.
    """
    limit = parse_number(str(parameters))
    both = [name for name in _CHOSEN if fields.get(name) not in (None, {}, False)]
    if both:
        given = ", ".join(f"{name}={fields[name]!r}" for name in both)
        raise NdLoraValueError(
            f"parameters={parameters} chooses what {given} says: leave one of the two out."
        )
    if model is None:
        return dict(fields)
    targets = {name: fields[name] for name in _TARGETS if fields.get(name) is not None}
    choice = choose_adapter(model, parameters=limit, **targets)
    logger.info("parameters=%s: %s %s", parameters, choice.python.partition("  #")[0], choice.budget.summary)
    return {**fields, **choice.options}


def _plan(model: nn.Module, config: NdLoraConfig) -> list:
    layers = plan_model(model, config)
    if not layers:
        raise NdLoraValueError(
            f"target_modules={config.target_modules!r} match no layer of this model. Leave them out to adapt every "
            f"linear layer."
        )
    return layers


def _trained(budget: Budget) -> int:
    return budget.parameters


def _saved(budget: Budget) -> int:
    return budget.saved


@cache
def _families() -> list[dict[str, Any]]:
    return json.loads(files(__package__ or "").joinpath("evidence.json").read_text())["families"]


def _smallest(model: nn.Module, options: Mapping[str, Any], size: Callable[[Budget], int]) -> int:
    return size(make_budget(_plan(model, NdLoraConfig(**options, r=1)), _LORA_RANK))


def _largest(
    model: nn.Module, options: Mapping[str, Any], limit: int, size: Callable[[Budget], int]
) -> dict[str, Any] | None:
    """The options with the largest rank that fits, and some layers of one rank more; None if not even rank 1 does."""

    def fits(rank: int, pattern: Mapping[str, int] | None = None) -> bool:
        """Whether it is neither too large for the budget or for a layer, nor too slow."""
        try:
            layers = _plan(model, NdLoraConfig(**options, r=rank, rank_pattern=dict(pattern or {})))
        except NdLoraValueError:
            return False
        budget = make_budget(layers, _COSTLIEST)
        return size(budget) <= limit and budget.multiply_adds <= budget.lora_parameters

    if not fits(1):
        return None
    low, high = 1, 2
    while high <= _MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    made = {**options, "r": low}
    pattern = dict(_filled(model, made, limit, size))
    # a name may be the end of another layer's, and stand for that too
    return made | ({"rank_pattern": pattern} if pattern and fits(low, pattern) else {})


def _filled(
    model: nn.Module, options: Mapping[str, Any], limit: int, size: Callable[[Budget], int]
) -> Iterator[tuple[str, int]]:
    """`rank_pattern` of the layers that get one rank more: the last blocks, then single layers of those before."""
    rank = options["r"] + 1
    config = NdLoraConfig(**options)
    if config.resolved().method.shared is not None:  # what layers share has one rank
        return
    layers = _plan(model, config)
    try:
        larger = dict(_plan(model, NdLoraConfig(**{**options, "r": rank})))
    except NdLoraValueError:  # too large for some layer
        return
    cost = {
        name: size(make_budget([(name, larger[name])])) - size(make_budget([(name, plan)]))
        for name, plan in layers
    }
    left = limit - size(make_budget(layers))
    blocks: dict[str, list[str]] = {}
    for name in reversed(cost):
        blocks.setdefault(_block(name), []).append(name)
    whole = []
    lists: dict[str, list[str]] = {}  # a list of blocks -> the numbers of those
    for block, names in blocks.items():
        if not block or sum(cost[name] for name in names) > left:
            break
        whole.append(block)
        left -= sum(cost[name] for name in names)
        stem, _, number = block.rpartition(".")
        lists.setdefault(stem, []).insert(0, number)
    for stem, numbers in lists.items():
        yield f"{stem.replace('.', '[.]')}[.]({'|'.join(numbers)})[.].*", rank
    rest = [name for block, names in blocks.items() if block not in whole for name in names]
    goal = (1 - _FULL) * limit
    for name in sorted(rest, key=cost.__getitem__, reverse=True):
        if left <= goal / 4:
            return
        if 0 < cost[name] <= left:
            left -= cost[name]
            yield name, rank


def _block(layer: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`; "" where nothing is numbered."""
    match = re.match(r"(.*?\.\d+)\.", layer)
    return match[1] if match else ""


def _known(points: Sequence[Mapping[str, Any]], fraction: float) -> tuple[dict[str, float], float, bool]:
    """(track -> share of LoRA r=8's gain at this size, the learning rate as a multiple of LoRA r=8's, measured)."""
    kept, ratios, measured = {}, [], True
    for track in dict.fromkeys(point["track"] for point in points):
        own = sorted((p for p in points if p["track"] == track), key=lambda p: p["fraction"])
        ratios.append(min(own, key=lambda p: abs(math.log(p["fraction"] / fraction)))["rate"])
        measured &= own[0]["fraction"] / _NEAR <= fraction <= own[-1]["fraction"] * _NEAR
        low = max((p for p in own if p["fraction"] <= fraction), key=lambda p: p["fraction"], default=own[0])
        high = min((p for p in own if p["fraction"] > fraction), key=lambda p: p["fraction"], default=own[-1])
        width = math.log(high["fraction"] / low["fraction"])
        share = math.log(fraction / low["fraction"]) / width if width else 0.0
        kept[track] = low["kept"] + (high["kept"] - low["kept"]) * min(1.0, max(0.0, share))
    return kept, math.exp(sum(map(math.log, ratios)) / len(ratios)), measured


def _round(rate: float) -> float:
    """To one digit."""
    return float(f"{rate:.0e}")
