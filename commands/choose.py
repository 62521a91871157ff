"""`ndlora plan --parameters 1M`: the adapter for a budget, for a model that is only known by its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.axolotl.keys import YAML_KEYS
from ndlora_plugins.integrations.peft.choose import (
    BYTES_A_NUMBER,
    Choice,
    choose_adapter,
    lora_parameters,
    parse_number,
)

from .plan import model_from_config

__all__ = ["as_axolotl", "as_dict", "as_text", "choose_for_config"]


def choose_for_config(
    model: str,
    *,
    parameters: str | None = None,
    file_bytes: str | None = None,
    like_lora_r: int | None = None,
    fraction: str | None = None,
    **options: Any,
) -> Choice:
    """The best known adapter within a budget.

    Args:
        model: a directory with a config.json, that file itself, or a name on the hub.
        parameters, file_bytes: a number such as "1M" or "250k"; bytes also as "2MB".
        like_lora_r, fraction: as many parameters as plain LoRA of this rank has, times "1/16" or "0.1".
        **options: of `choose_adapter`: `lora_rate`, `target_modules`.

    Raises:
        NdLoraValueError: no number, no budget or two, or one that nothing fits into.
    """
    given = [name for name in (parameters, file_bytes, like_lora_r) if name is not None]
    if len(given) != 1 or (fraction is not None and like_lora_r is None):
        raise NdLoraValueError(
            "Give one budget: --parameters, --bytes, or --like-lora-r with or without --fraction."
        )
    network = model_from_config(model)
    if file_bytes is not None:
        return choose_adapter(network, file_bytes=parse_number(file_bytes, unit="B"), **options)
    if parameters is not None:
        return choose_adapter(network, parameters=parse_number(parameters), **options)
    assert like_lora_r is not None, "one of the three is given"
    targets = {name: value for name, value in options.items() if name != "lora_rate"}
    limit = lora_parameters(network, like_lora_r, **targets) * parse_fraction(fraction or "1")
    return choose_adapter(network, parameters=int(limit), **options)


def parse_fraction(text: str) -> Fraction:
    """`1/16` or `0.1`.

    Raises:
        NdLoraValueError: anything else, or not above 0.
    """
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if found <= 0:
        raise NdLoraValueError(f"--fraction {text!r}: write it as 1/16 or 0.1.")
    return found


def as_dict(choice: Choice) -> dict[str, Any]:
    """For `--json`."""
    budget = choice.budget
    return {
        "options": dict(choice.options),
        "learning_rate": choice.learning_rate,
        "parameters": budget.parameters,
        "saved": budget.saved,
        "bytes": budget.saved * BYTES_A_NUMBER,
        "lora_parameters": budget.lora_parameters,
        "kept": _rounded(choice.kept),
        "measured": choice.measured,
        "python": choice.python,
        "yaml": choice.yaml,
        "axolotl": as_axolotl(choice),
    }


def as_text(choice: Choice) -> str:
    """What it costs, what is known of it, and the lines to paste."""
    budget = choice.budget
    size = f"{budget.saved * BYTES_A_NUMBER:,} bytes in float32"
    kept = ", ".join(f"{share:.0%} ({track})" for track, share in sorted(choice.kept.items()))
    known = f"On the tracks of docs/evidence.md it kept, of what LoRA r=8 gains: {kept}."
    if not choice.measured:
        known += " That was at the nearest size: about this one was not measured."
    return "\n".join(
        [
            f"{budget.summary} Its file: {size}.",
            known,
            "",
            "Python:",
            f"  {choice.python}",
            "",
            "YAML of `ndlora sft`:",
            *(f"  {line}" for line in choice.yaml.splitlines()),
            "",
            "YAML of Axolotl:",
            *(f"  {line}" for line in as_axolotl(choice).splitlines()),
        ]
    )


def as_axolotl(choice: Choice) -> str:
    """Axolotl's own keys where it has them, the rest in the block `ndlora:`."""
    own = {YAML_KEYS[name]: value for name, value in choice.options.items() if name in YAML_KEYS}
    block = {name: value for name, value in choice.options.items() if name not in YAML_KEYS}
    lines = ["adapter: ndlora", f"learning_rate: {choice.learning_rate:g}"]
    lines += [f"{name}: {json.dumps(value)}" for name, value in own.items()]
    lines += ["ndlora:", *(f"  {name}: {json.dumps(value)}" for name, value in block.items())]
    return "\n".join(lines)


def _rounded(kept: Mapping[str, float]) -> dict[str, float]:
    return {track: round(share, 3) for track, share in kept.items()}
