"""The YAML's `ndlora:` block, checked by pydantic, and the whole YAML checked against `NdLoraConfig`."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from ndlora_plugins.errors import NdLoraValueError

from ..peft import NdLoraConfig
from .keys import YAML_KEYS, build_callback, build_config

__all__ = ["NdLoraArgs", "NdLoraBlock"]

_HELP = {field.name: field.metadata.get("help") for field in dataclasses.fields(NdLoraConfig)}


def _field(name: str) -> Any:
    """Optional, with the text that NdLoraConfig has: a default that the user did not write stays unsaid."""
    return Field(default=None, json_schema_extra={"description": _HELP[name]})


class NdLoraBlock(BaseModel):
    """The fields of `NdLoraConfig` that Axolotl has no key for, and the callback.

    Raises:
        pydantic.ValidationError: an unknown key (the message lists the known ones) or a wrong value.
    """

    model_config = ConfigDict(extra="forbid")

    method: str | None = _field("method")
    anchor: Literal["snapshot", "none"] | None = _field("anchor")
    options: dict[str, Any] | None = _field("options")
    # strict: `true` is not the number 1
    num_modes: StrictInt | None = _field("num_modes")
    crossed_modes: StrictInt | None = _field("crossed_modes")
    modes: dict[str, Any] | None = _field("modes")
    random_seed: StrictInt | None = _field("random_seed")
    bias: Literal["none", "all", "ndlora_only"] | None = _field("bias")
    save_frozen: bool | None = _field("save_frozen")
    schedules: dict[str, Any] | list[str] | str | None = _field("schedules")
    gradient_batches: StrictInt | None = _field("gradient_batches")
    parameters: int | str | None = Field(
        default=None,
        json_schema_extra={
            "description": "A budget such as 1M: chooses the method and its options, by docs/evidence.md."
        },
    )
    callback: bool | dict[str, Any] | None = Field(
        default=None,
        json_schema_extra={
            "description": "true, or a mapping of NdLoraCallback's arguments: switches it on."
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for key in data:
            if key in cls.model_fields:
                continue
            known = ", ".join(cls.model_fields)
            elsewhere = YAML_KEYS.get(key) or (key if key in YAML_KEYS.values() else None)
            if elsewhere is not None:
                raise NdLoraValueError(
                    f"ndlora.{key} does not exist: write `{elsewhere}:` at the top level of the YAML, where "
                    f"Axolotl has it. Keys of the block: {known}."
                )
            close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise NdLoraValueError(f"ndlora.{key} does not exist.{hint} Keys of the block: {known}.")
        return data


class NdLoraArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's schema."""

    ndlora: NdLoraBlock | None = Field(
        default=None,
        json_schema_extra={"description": "Options of `adapter: ndlora` that Axolotl has no key for."},
    )
    # read by Axolotl's loader, but missing from its schema, so that it would be dropped
    lora_exclude_modules: str | list[str] | None = Field(
        default=None, json_schema_extra={"description": _HELP["exclude_modules"]}
    )

    @model_validator(mode="after")
    def _fits_ndlora_config(self):
        adapter = getattr(self, "adapter", None)
        if adapter == "ndlora":
            # wrong values are found here, before the data set is prepared and the model loaded
            build_config(self)
            build_callback(self)
        elif self.ndlora is not None:
            raise NdLoraValueError(
                f"The block `ndlora:` says nothing with adapter: {adapter}. Write `adapter: ndlora`, or take "
                f"the block out."
            )
        return self
