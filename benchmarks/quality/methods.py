"""The methods by name, in the order of the tables."""

from __future__ import annotations

from benchmarks.quality import free, peers
from benchmarks.quality.controlled import Adaptlr, Auto, Raise, RaiseAlone
from benchmarks.quality.method import Method

METHODS: dict[str, type[Method]] = {
    "adaptlr": Adaptlr,
    "plain": peers.Plain,
    "plateau": peers.Plateau,
    "greedy": peers.Greedy,
    "skip6": peers.SkipSixSigma,
}
# At rates that are too low: measured apart, beside "adaptlr".
RAISES: dict[str, type[Method]] = {"raise": Raise, "raise_alone": RaiseAlone}
# Given no rate, so no multiple of the best one either: measured apart.
SEARCHES: dict[str, type[Method]] = {"auto": Auto}
# With one rate for all tasks, or none: measured beside the searches.
FIXED: dict[str, type[Method]] = {
    "prodigy": free.Prodigy,
    "dadaptation": free.DAdaptation,
    "dog": free.Dog,
    "schedulefree": free.ScheduleFree,
    "greedy_up": peers.GreedyUp,
    "dlrs": peers.Dlrs,
}
ALL_METHODS = METHODS | RAISES | SEARCHES | FIXED
