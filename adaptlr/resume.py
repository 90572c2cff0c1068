"""What a run is resumed from, and what it says about that."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

from adaptlr.checkpoint import Checkpoint
from adaptlr.saved_slots import SavedSlots
from adaptlr.telemetry import Phase


class Loading(NamedTuple):
    """What a checkpoint holds of the controller: its state, and snapshots where asked for."""

    checkpoint: Checkpoint
    slots: SavedSlots | None


def resume_story(loading: Loading, state: npt.NDArray[Any], lack: str) -> str:
    """Return where a run goes on, and what could not for lack of snapshots.

    Args:
        loading: What it goes on from.
        state: The State that it goes on with.
        lack: Why there are no snapshots, in words that end a sentence; empty: there are.
    """
    saved = loading.checkpoint.state
    story = f"resumed at step {int(state['step'])}"
    if loading.slots is not None:
        story += " without the checkpoint's snapshots" if lack else " with its snapshots"
    if saved["phase"] == state["phase"]:
        return story
    name = Phase(int(saved["phase"])).name.lower()
    story += f"; the {name} that was under way needs snapshots, {lack}: it ends with "
    if saved["phase"] == Phase.SEARCH:
        peak = float(state["cut_factor"] * state["peak"])
        return f"{story}a peak of {peak:.3g}, from the weights at hand"
    return f"{story}{float(state['cut_factor']):.3g} of the schedule"
