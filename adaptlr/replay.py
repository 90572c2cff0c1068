"""What the controller would have done to a run whose losses are known.

The losses do not react: from the first change of the learning rate on, the real run would have had
others. So the first event is a fact about the recorded run, and what follows is a sketch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adaptlr._extension import HostController
from adaptlr.config import ResolvedConfig
from adaptlr.events import Event
from adaptlr.ring_reader import RingReader

_READ_EVERY = 1000  # steps; the event ring keeps 1024


class Replay(NamedTuple):
    """What came of it.

    Attributes:
        records: The flight record, one a step.
        events: What would have been done and why.
        ended: Whether the guard would have ended the run; nothing is replayed beyond.
    """

    records: npt.NDArray[Any]
    events: list[Event]
    ended: bool


def replay(
    config: ResolvedConfig,
    losses: npt.NDArray[np.float64],
    grad_norms: npt.NDArray[np.float64] | None = None,
) -> Replay:
    """Run the real control step over recorded losses.

    Args:
        config: The run's settings.
        losses: One a step, shape ``(steps,)``.
        grad_norms: Shape ``(steps,)``, negative where there is none.
    """
    controller = HostController(config.row, 2 * _READ_EVERY)
    rings = RingReader(controller)
    norms = np.full(len(losses), -1.0) if grad_norms is None else grad_norms
    records: list[npt.NDArray[Any]] = []
    events: list[Event] = []
    for start in range(0, len(losses), _READ_EVERY):
        part = slice(start, start + _READ_EVERY)
        for loss, norm in zip(losses[part].tolist(), norms[part].tolist(), strict=True):
            controller.step(loss, norm)
        news = rings.read(last=True)
        records.append(news.records)
        events.extend(news.events)
        if any(event.kind == "failed" for event in news.events):
            break
    ends = [event.step for event in events if event.kind == "failed"]
    whole = np.concatenate(records)
    whole = whole[whole["step"] <= ends[0]] if ends else whole
    return Replay(whole, events, bool(ends))
