"""A training that goes on must have the schedules that it began with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, cast

from transformers import TrainerState

from ..peft.layers.shared import Clock

__all__ = ["check_resumed", "noted_schedules"]


def noted_schedules(clocks: Iterable[Clock]) -> dict[str, dict[str, Any]]:
    """Adapter -> schedule -> its options, with all defaults filled in, as JSON has them."""
    return {
        adapter: {each.schedule.name: asdict(each.options) for each in chosen}
        for clock in clocks
        for adapter, chosen in clock.chosen.items()
        if chosen
    }


def check_resumed(state: TrainerState, now: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """List what differs from the checkpoint that the trainer goes on from, one sentence each."""
    saved = cast("dict[str, Any]", state.stateful_callbacks or {}).get("NdLoraCallback")
    if not state.global_step or not isinstance(saved, dict):
        return ()
    before = saved.get("attributes", {}).get("_noted", {})
    if before == now:
        return ()
    return (
        f"the checkpoint of step {state.global_step} was trained with schedules={before}, and now they are {now}: give "
        f"the same ones, or begin anew",
    )
