"""The export at the end of a training: `NdLoraCallback(export="merged")`."""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from ndlora_plugins.errors import NdLoraTypeError, NdLoraValueError

from ..peft.exports.export import EXPORT_KINDS, export_adapter
from ..peft.files.directories import check_new

__all__ = ["EndExport", "make_export"]

logger = logging.getLogger("ndlora_plugins")

# what a mapping may say besides `to` and `directory`
_OPTIONS = set(inspect.signature(export_adapter).parameters) - {"adapter", "output", "to", "dtype"}


def make_export(
    given: str | Mapping[str, Any] | Callable[[nn.Module, TrainingArguments], Any] | None,
) -> Callable[[nn.Module, TrainingArguments], Any] | None:
    """Make of what `NdLoraCallback(export=...)` takes a function of (model, args).

    Raises:
        NdLoraTypeError: none of those.
        NdLoraValueError: an unknown kind or option.
    """
    if given is None or callable(given):
        return given
    options = {"to": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping):
        raise NdLoraTypeError(
            f"export={given!r}: give one of {list(EXPORT_KINDS)}, a mapping with `to` and `directory`, or a "
            f"callable that takes (model, args)."
        )
    if options.get("to") not in EXPORT_KINDS:
        raise NdLoraValueError(f"export={given!r}: `to` has to be one of {list(EXPORT_KINDS)}.")
    unknown = sorted(set(options) - {"to", "directory", *_OPTIONS})
    if unknown:
        raise NdLoraValueError(
            f"export: unknown options {unknown}. Known: to, directory, {', '.join(sorted(_OPTIONS))}."
        )
    return EndExport(**options)


class EndExport:
    """Exports the active adapter as it is at the end of the training.

    Args:
        to: a kind of `ndlora export --to`.
        directory: a new directory; by default the one called as `to` in the trainer's output_dir.
        options: further ones of `export_adapter`.
    """

    def __init__(self, to: str, directory: str | Path | None = None, **options: Any):
        self.to = to
        self.directory = directory
        self.options = options

    def target(self, args: TrainingArguments) -> Path:
        """The place that it will be written to.

        Raises:
            NdLoraValueError: something is there already.
        """
        return check_new(self.directory or Path(args.output_dir or ".") / self.to)

    def __call__(self, model: Any, args: TrainingArguments) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            if isinstance(model, PeftModel):
                model.save_pretrained(scratch, selected_adapters=cast("list[str]", [model.active_adapter]))
            else:  # transformers' add_adapter
                model.save_pretrained(scratch)
            saved = next(Path(scratch).rglob("adapter_config.json")).parent  # below, if not called "default"
            report = export_adapter(saved, self.target(args), self.to, **self.options)
        logger.info("exported to %s: %s", self.to, report.directory)
