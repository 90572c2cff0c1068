"""adaptlr: a learning-rate controller for any torch optimizer that decides on the device."""

from adaptlr.config import Guard, Schedule
from adaptlr.controller import AdaptiveLR
from adaptlr.errors import TrainingDiverged
from adaptlr.events import Event
from adaptlr.recorder import Recorder
from adaptlr.telemetry import Action, Flag, Phase, Status

__version__ = "0.1.0"

__all__ = [
    "Action",
    "AdaptiveLR",
    "Event",
    "Flag",
    "Guard",
    "Phase",
    "Recorder",
    "Schedule",
    "Status",
    "TrainingDiverged",
]
