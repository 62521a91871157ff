"""Schedules: what happens to an adapter during training, by name."""

from ndlora_plugins.schedules.base import Moment, Outputs, Place, Ranks, Schedule, TrainedLayer, Training

__all__ = ["Moment", "Outputs", "Place", "Ranks", "Schedule", "TrainedLayer", "Training"]
