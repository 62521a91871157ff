"""`NdLoraCallback`: for transformers' Trainer, every trainer of TRL's, and Axolotl's."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning

from ..peft.layers.shared import Clock
from ..peft.tuner.schedules import (
    add_penalty_gradients,
    after_step,
    check_schedules,
    set_schedules,
)
from .card import note_plot, note_recipe
from .checks import (
    adapted_layers,
    check_gradients,
    check_start,
    trained_factors,
)
from .export import EndExport, make_export
from .gradients import measure_on_batches
from .norms import base_norm, update_norms
from .patches import call_first
from .plot import check_plot, draw_history
from .resume import check_resumed, noted_schedules
from .schedule import CoreOnly

__all__ = ["NdLoraCallback", "make_callback"]

logger = logging.getLogger("ndlora_plugins")


class NdLoraCallback(TrainerCallback, ExportableState):
    """Watches the training of NDLORA adapters: `SFTTrainer(..., callbacks=[NdLoraCallback()])`.

    Before the first step it checks which layers are adapted, the number of trainable parameters against the
    plan, that nothing else trains, and that the optimizer has every factor; in the first step that brings a
    gradient, that one reaches every factor. It runs the adapters' schedules (docs/schedules.md): tells the layers
    which step is running, adds penalties to the gradients, and lets factors be changed after each step. At each of
    the trainer's own logging steps it adds to the logs, and so to `state.log_history` and to whatever `report_to`
    names, `ndlora/<adapter>/update_norm` and `..._max`: the median and the largest of ||scaling dW||_F / ||W||_F over
    the layers.

    Args:
        strict: raise what a check finds; False warns instead.
        log_norms: whether the update norms are logged.
        core_only_at: from here on only `core` trains, as IntTune does (methods that train one): a step (int) or a
            fraction of all steps (float between 0 and 1). The optimizer's state of `core` stays as it is.
        schedules: of the active adapters, in place of what their configuration says: {"nested_rank": {"least": 2}},
            or a name, or a list of names. The trainer's state keeps them, and a resumed training must have the same.
        export: at the end of training, in the main process only: a kind of `ndlora export --to`; or a mapping with
            `to` (such a kind), `directory` (new; by default `<output_dir>/<to>`) and further options of
            `export_adapter`; or a callable, called as export(model, args). A failure is a warning, so that the
            trainer still saves the adapter.
        plot: where to write a PNG of loss and update norms at the end (needs matplotlib); the model card shows it. A
            failure is a warning here too.

    Raises:
        NdLoraValueError: a check fails (`strict`), a schedule or `core_only_at` cannot work with the model, or
            `export` is unknown or has no room, or `plot` is a directory.
        NdLoraTypeError: `export` is none of these.
        MissingExtraError: `plot` without matplotlib.
    """

    def __init__(
        self,
        strict: bool = True,
        log_norms: bool = True,
        core_only_at: int | float | None = None,
        schedules: Mapping[str, Mapping[str, Any] | None] | Sequence[str] | str | None = None,
        export: str | Mapping[str, Any] | Callable[[nn.Module, TrainingArguments], Any] | None = None,
        plot: str | Path | None = None,
    ):
        if plot is not None:
            check_plot(plot)
        call_first(NdLoraCallback)
        self._arguments = {"strict": strict, "log_norms": log_norms, "core_only_at": core_only_at}
        self.strict = strict
        self.log_norms = log_norms
        self.schedule = None if core_only_at is None else CoreOnly(core_only_at)
        self.schedules = None if schedules is None else check_schedules(schedules)
        self.export = make_export(export)
        self.plot = plot
        self._layers = []
        self._base_norms: dict[str, float] = {}
        self._gradients_pending = False
        self._scheduled = False
        self._noted: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """The state that the trainer keeps: the schedules of each adapter, and arguments that JSON can hold."""
        return {
            "args": {**self._arguments, "schedules": self.schedules},
            "attributes": {"_noted": self._noted},
        }

    def on_train_begin(
        self, args, state, control, model: Any = None, optimizer=None, train_dataloader=None, **kwargs
    ):
        self._layers = adapted_layers(model)
        for clock in self._clocks():
            clock.release()
        sharded = _is_sharded(args)
        if isinstance(self.export, EndExport):
            self.export.target(args)
            if sharded:
                raise NdLoraValueError(
                    "export= does not work under DeepSpeed or FSDP, where no process holds the whole adapter: "
                    "leave it out, and run `ndlora export` afterwards."
                )
        report = check_start(model, None if sharded else optimizer)
        if state.is_world_process_zero:
            for adapter, (method, layers, numbers) in report.adapters.items():
                logger.info(
                    "adapter %r (%s): %d layers, %s trainable numbers",
                    adapter,
                    method,
                    layers,
                    f"{numbers:,}",
                )
            if report.besides:
                logger.info("beside the adapters %s numbers train", f"{report.besides:,}")
        self._complain(report.problems)
        if not state.global_step:  # a resumed training goes on with the checkpoint's values
            for adapter, batches in measure_on_batches(model, train_dataloader, sharded).items():
                logger.info("adapter %r starts from the gradients of %d batches", adapter, batches)
        note_recipe(model, args, state)
        self._gradients_pending = not sharded
        self._begin_schedules(model, args, state, sharded)
        for clock in self._clocks():
            clock.driven = True
        if self.schedule is not None:
            self.schedule.begin(self._layers, state.max_steps, sharded)
        if self.log_norms:
            self._base_norms = {name: base_norm(layer) for name, layer in self._layers}
            if not any(self._base_norms.values()) and state.is_world_process_zero:
                logger.info("update norms are not logged: no process holds a whole base weight")

    def on_step_begin(self, args, state, control, **kwargs):
        for clock in self._clocks():
            clock.step = state.global_step
        if (
            self.schedule is not None
            and self.schedule.advance(state.global_step)
            and state.is_world_process_zero
        ):
            logger.info("from step %d on only the cores train", state.global_step)

    def on_pre_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        if self._gradients_pending:
            report = check_gradients(self._layers)
            # nothing to see yet: all gradients zero, or fp16's loss scale still too high
            if not report.silent and not (report.overflowed and args.fp16):
                self._gradients_pending = False
                self._complain(report.problems)
        if self._scheduled:
            add_penalty_gradients(model)
        if self.schedule is not None:
            self.schedule.drop_gradients()

    def on_optimizer_step(self, args, state, control, model: Any = None, optimizer=None, **kwargs):
        if self._scheduled:
            after_step(model, optimizer)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.log_norms or logs is None or "loss" not in logs:  # evaluations and the summary have none
            return
        norms = update_norms(self._layers, self._base_norms)
        logs.update(norms)
        # the trainer has put a copy of `logs` there already
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(norms)

    def on_train_end(self, args, state, control, model: Any = None, **kwargs):
        for clock in self._clocks():
            clock.release()
        if not state.is_world_process_zero:
            return
        if self._gradients_pending and self._layers:
            warnings.warn(
                "No step brought any gradient that is not zero: nothing was learned.",
                NdLoraWarning,
                stacklevel=2,
            )
        if self.plot is not None:
            with _warned("the plot"):
                draw_history(state.log_history, self.plot)
                note_plot(model, self.plot)
        if self.export is not None:
            with _warned("the export", " Save the adapter and run `ndlora export` on it."):
                self.export(model, args)

    def _begin_schedules(self, model, args, state, sharded: bool) -> None:
        if self.schedules is not None:
            trained = {name for _, layer in self._layers for name in trained_factors(layer)}
            set_schedules(model, sorted(trained), self.schedules)
        chosen = [each for clock in self._clocks() for found in clock.chosen.values() for each in found]
        asking = [each.schedule.name for each in chosen if each.schedule.penalty or each.schedule.after_step]
        if asking and sharded:
            raise NdLoraValueError(
                f"schedules={asking} do not work under DeepSpeed or FSDP, where no process holds whole factors: leave "
                f"them out."
            )
        if any(each.schedule.penalty for each in chosen) and args.fp16 and not args.max_grad_norm:
            raise NdLoraValueError(
                "Penalties on factors do not work with fp16 without clipping, where the gradients are still scaled "
                "when they are added: set max_grad_norm, or use bf16."
            )
        self._scheduled, self._noted = bool(chosen), noted_schedules(self._clocks())
        self._complain(check_resumed(state, self._noted))

    def _clocks(self) -> list[Clock]:
        return list({id(layer.clock): layer.clock for _, layer in self._layers}.values())

    def _complain(self, problems: tuple[str, ...]) -> None:
        if not problems:
            return
        message = "NdLoraCallback: " + "; ".join(problems) + "."
        if self.strict:
            raise NdLoraValueError(message)
        warnings.warn(message, NdLoraWarning, stacklevel=3)


@contextmanager
def _warned(what: str, remedy: str = "") -> Iterator[None]:
    """Warn of a failure, whatever it is: the trainer has yet to save the adapter."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"NdLoraCallback: {what} failed, the training did not ({type(error).__name__}: {error}){remedy}",
            NdLoraWarning,
            stacklevel=2,
        )


def make_callback(options: Mapping[str, Any], where: str) -> NdLoraCallback:
    """The callback from a mapping of its arguments, as a YAML has it.

    Args:
        where: what messages call the mapping.

    Raises:
        NdLoraValueError: no mapping, an unknown argument, or a value that cannot work.
    """
    if not isinstance(options, Mapping):
        raise NdLoraValueError(f"{where}: {options!r}: give a mapping of NdLoraCallback's arguments.")
    known = list(inspect.signature(NdLoraCallback).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise NdLoraValueError(f"{where}: unknown options {unknown}. Known: {', '.join(known)}.")
    return NdLoraCallback(**options)


def _is_sharded(args: TrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP may hold parameters and gradients where they cannot be looked at."""
    return bool(
        args.deepspeed
        or args.fsdp
        or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    )
