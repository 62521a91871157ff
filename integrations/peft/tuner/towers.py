"""The parts of a multimodal model, as transformers finds them: language, and the towers of images and of sound."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning

__all__ = ["SHORTHANDS", "find_parts", "layers_of_part", "part_of", "warn_of_towers"]

# `target_modules` -> the part whose linear layers it means
SHORTHANDS = {"language-linear": "language", "vision-linear": "vision"}
_TOWERS = {"vision": "image", "audio": "audio"}  # as transformers calls the modality


def find_parts(model: nn.Module) -> dict[str, str]:
    """Part ("language", "vision", "audio") -> the name of its module; empty unless the model has a tower.

    What lies between them, such as a projector, is in none.
    """
    encoder, decoder = getattr(model, "get_encoder", None), getattr(model, "get_decoder", None)
    if encoder is None or decoder is None:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for part, modality in _TOWERS.items():
        try:
            tower = encoder(modality=modality)
        except (TypeError, AttributeError, ValueError):  # a model with an older or another such function
            continue
        name = names.get(id(tower), "")
        if name and tower is not getattr(model, "base_model", None):
            found[part] = name
    language = names.get(id(decoder()), "") if found else ""
    return {"language": language, **found} if language and language not in found.values() else found


def part_of(layer: str, parts: dict[str, str]) -> str | None:
    """The part that a layer lies in; None for one between them.

    Args:
        layer: its name in the model.
        parts: of the model, as `find_parts` gives them.
    """
    return next((part for part, name in parts.items() if layer.startswith(f"{name}.")), None)


def layers_of_part(shorthand: str, names: Iterable[str], model: nn.Module) -> set[str]:
    """The part of the linear layers `names` that a shorthand means.

    Raises:
        NdLoraValueError: the model has no such part.
    """
    part, parts = SHORTHANDS[shorthand], find_parts(model)
    if part not in parts and not (part == "language" and not parts):
        has = f"its parts are {parts}" if parts else "it has one part only"
        raise NdLoraValueError(
            f"target_modules={shorthand!r}: {type(model).__name__} has no {part} part that transformers knows of; "
            f"{has}. Use 'all-linear', or name the layers."
        )
    return {name for name in names if part_of(name, parts) == part or not parts}


def warn_of_towers(model: nn.Module, asked: Any, names: Iterable[str]) -> None:
    """One warning where a tower is adapted and nobody named it.

    Args:
        asked: `target_modules` as the user gave it.
        names: of the adapted layers.
    """
    if isinstance(asked, str) and asked.lower() != "all-linear":
        return
    parts = find_parts(model)
    for part in _TOWERS.keys() & parts.keys():
        inside = [name for name in names if part_of(name, parts) == part]
        last = parts[part].rpartition(".")[2]
        # a path into the tower names it, and a saved adapter holds such paths
        named = not isinstance(asked, str) and any(last in f".{entry}".split(".") for entry in asked or ())
        if inside and not named:
            warnings.warn(
                f"{len(inside)} layers of the {part} part {parts[part]!r} are adapted too: servers such as vLLM serve "
                f"adapters of the language part only. target_modules='language-linear' leaves them out; a path or a "
                f"regex that names them, or 'vision-linear', says that they are meant.",
                NdLoraWarning,
                stacklevel=2,
            )
