"""Device time, from the tracing that the profiler does on the GPU itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch._C._autograd import DeviceType

from adaptlr.bench.timing import Action, Quartiles, quartiles, synchronizer

CONTROL_KERNEL = "adaptlr_control_step"
TRACED_CALLS = 50


@dataclass(frozen=True)
class DeviceWork:
    """What one call has the device do.

    Attributes:
        durations: Microseconds of every traced kernel or copy, by name.
        calls: Calls that were traced.
    """

    durations: dict[str, list[float]]
    calls: int

    @property
    def kernels(self) -> float:
        """Kernels and copies in one call."""
        return sum(len(durations) for durations in self.durations.values()) / self.calls

    @property
    def time(self) -> float:
        """Microseconds of device time in one call: of every kernel the median."""
        times = (np.median(values) * len(values) for values in self.durations.values())
        return float(sum(times)) / self.calls

    @property
    def control_kernel(self) -> Quartiles | None:
        """Quartiles of the control kernel's duration, or None if it did not run."""
        durations = self.durations.get(CONTROL_KERNEL)
        return quartiles(np.array(durations)) if durations else None


def trace(action: Action, losses: Sequence[torch.Tensor]) -> DeviceWork:
    """Trace ``action`` once for every loss."""
    wait = synchronizer(losses[0].device)
    action(losses[0])
    wait()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for loss in losses:
            action(loss)
        wait()
    durations: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        # record_function leaves a span on the device as well; it is no work.
        span = getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")
        if event.device_type == DeviceType.CUDA and not span:
            durations[event.name].append(event.time_range.elapsed_us())
    return DeviceWork(dict(durations), len(losses))
