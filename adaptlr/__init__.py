"""adaptlr: a learning-rate controller for any torch optimizer that decides on the device."""

from adaptlr.config import Guard, Schedule
from adaptlr.controller import AdaptiveLR
from adaptlr.errors import TrainingDiverged
from adaptlr.estimate import LREstimate, estimate_lr
from adaptlr.events import Event
from adaptlr.prior import LRRange, prior_lr
from adaptlr.range_result import RangeTest
from adaptlr.range_test import find_lr
from adaptlr.telemetry import Action, Flag, Phase, Status

__version__ = "0.1.0"

__all__ = [
    "Action",
    "AdaptiveLR",
    "Event",
    "Flag",
    "Guard",
    "LREstimate",
    "LRRange",
    "Phase",
    "RangeTest",
    "Schedule",
    "Status",
    "TrainingDiverged",
    "estimate_lr",
    "find_lr",
    "prior_lr",
]
