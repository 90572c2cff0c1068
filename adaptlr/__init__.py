"""adaptlr: a learning-rate controller for any torch optimizer that decides on the device."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adaptlr.config import Guard, Schedule, Search
from adaptlr.controller import AdaptiveLR
from adaptlr.errors import TrainingDiverged
from adaptlr.events import Event
from adaptlr.recorder import Recorder
from adaptlr.telemetry import Action, Flag, Phase, Status

if TYPE_CHECKING:
    from adaptlr.estimate import LREstimate, estimate_lr
    from adaptlr.prior import LRRange, prior_lr
    from adaptlr.range_result import RangeTest
    from adaptlr.range_test import find_lr

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
    "Recorder",
    "Schedule",
    "Search",
    "Status",
    "TrainingDiverged",
    "estimate_lr",
    "find_lr",
    "prior_lr",
]

# For use before training, and imported when first asked for: most runs never do.
_BEFORE_TRAINING = {
    "LREstimate": "estimate",
    "LRRange": "prior",
    "RangeTest": "range_result",
    "estimate_lr": "estimate",
    "find_lr": "range_test",
    "prior_lr": "prior",
}


def __getattr__(name: str) -> Any:
    """Import what belongs to `_BEFORE_TRAINING`."""
    if name not in _BEFORE_TRAINING:
        raise AttributeError(f"module 'adaptlr' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"adaptlr.{_BEFORE_TRAINING[name]}"), name)
    return value
