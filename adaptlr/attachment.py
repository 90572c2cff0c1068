"""One controller bound to one optimizer: what the hooks call, at steps and at checkpoints."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from adaptlr import _extension
from adaptlr.checkpoint import KEY, Checkpoint, pack, unpack
from adaptlr.compiled import hook_of
from adaptlr.config import ResolvedConfig
from adaptlr.errors import TrainingDiverged
from adaptlr.events import Event, make_events
from adaptlr.first_moments import FirstMoments
from adaptlr.hooks import replace_closure
from adaptlr.host_path import HostPath
from adaptlr.resume import Loading, resume_story
from adaptlr.saved_slots import SNAPSHOTS_KEY, pack_slots
from adaptlr.telemetry import Flag, restored_slot

if TYPE_CHECKING:
    from adaptlr.capturable_path import CapturablePath
    from adaptlr.first_gradient import FirstGradient
    from adaptlr.fused_path import FusedPath
    from adaptlr.late_float_path import LateFloatPath
    from adaptlr.snapshot import Snapshots

    Path: TypeAlias = HostPath | FusedPath | CapturablePath | LateFloatPath

logger = logging.getLogger("adaptlr")

FAILED: int = _extension.FAILED_NOTICE
EVENT: int = _extension.EVENT_NOTICE
_FORGOTTEN_STEPS = 3
_TOLD_EVENTS = 8
_TOLD_ONCE = int(Flag.ENDED | Flag.OVERWRITTEN | Flag.FAR_LR)


class Attachment:
    """Runs the control step before the optimizer's, heeds its answer, and keeps it in checkpoints.

    Attributes:
        optimizer: The user's optimizer.
        config: What the run was asked to be, as it stands now.
        path: Where decisions are made.
        snapshots: What a rollback goes back to.
        failure_told: Whether `TrainingDiverged` was raised already.
        own_events: What the host did by itself, oldest first; grows in place.
        saves_snapshots: Whether the optimizer's state dict carries snapshots as well.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: ResolvedConfig,
        path: Path,
        snapshots: Snapshots,
        gradient: FirstGradient,
        on_event: Callable[[Event], Any] | None = None,
        saves_snapshots: bool = False,
    ) -> None:
        """Take ``path`` into service."""
        self.optimizer = optimizer
        self.config = config
        self.path = path
        self.snapshots = snapshots
        self._gradient = gradient
        self._moments = FirstMoments(optimizer, config, path)
        self.failure_told = False
        self.start_step = 0
        self._made = (config.total_steps or 0, tuple(config.peaks))
        self.own_events: list[Event] = []
        self.saves_snapshots = saves_snapshots
        self._on_event = on_event
        self._told = 0  # events, to on_event
        path.unheeded = _TOLD_ONCE | FAILED | _extension.NEW_GROUPS | (EVENT if on_event else 0)
        self.pre_hook = self._connect(path)
        self.post_hook = self._connect_after(path) if snapshots.wanted else None
        self._loading: Loading | None = None

    def _connect(self, path: Path) -> Callable[..., Any]:
        """Return what the optimizer calls before its step: a quick way to `before_step`."""
        path.step_slowly, path.answer = self.before_step, self._answer
        if not isinstance(path, HostPath):
            path.poll = self.poll
        return hook_of(path, "before_step")

    def _connect_after(self, path: Path) -> Callable[..., Any] | None:
        """Return what the optimizer calls after every step; the host knows beforehand which."""
        return None if isinstance(path, HostPath) else hook_of(path, "after_step")

    # -- steps ----------------------------------------------------------------

    def before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decide before the optimizer's step; with a closure, once it has produced the loss."""
        if kwargs or len(args) > 1:
            replaced = replace_closure(args, kwargs, self._wrap)
            if replaced is not None:
                return replaced
        self._decide()
        return None

    def _decide(self) -> None:
        """Run the control step, unless nothing was observed: then the clock stands and lr stays.

        An optimizer is also stepped by others, DCP for one, to make its state appear; such a step
        is not ours.
        """
        path = self.path
        if path.suspended:
            self._gradient.take(self.start_step)
            return path.skip_suspended()
        if path.count == 0:
            if path.is_capturing():
                self.snapshots.prepare(self.start_step)
                return self._answer(path.step_in_graph())
            path.stand_aside()
            return self._note_unobserved()
        self._gradient.take(self.start_step)
        self.snapshots.prepare(self.start_step)
        self._moments.prepare()
        code = path.step()
        if code == _extension.NEW_GROUPS:
            self._adopt_groups()
            code = path.step()
        return self._answer(code)

    def _answer(self, code: int) -> None:
        """Do what a control step asks of the host: skip where it must, and heed notices."""
        if code & _extension.SKIP_STEP:
            self.path.skip()
        if code & _extension.ORDERED:
            self.path.await_update()  # type: ignore[union-attr]
        if code & self.path.unheeded:
            self.heed(code)

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that runs the control step once, after its first evaluation."""
        self.path.preset()
        decided = False

        def observed_closure() -> Any:
            nonlocal decided
            loss = closure()
            if not decided:
                decided = True
                if self.path.count == 0 and loss is not None:
                    self.path.observe(loss)
                self._decide()
            return loss

        return observed_closure

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Observe nothing and skip every step; the clock stands."""
        path = self.path
        if path.count:
            path.drop()
        path.suspended = True
        try:
            yield
        finally:
            path.suspended = False
            path.resume()
            self._moments.tell()
            self.snapshots.resumed(self.start_step)

    def _note_unobserved(self) -> None:
        if self.path.has_gradients():
            self.path.unobserved += 1
        if self.path.unobserved == _FORGOTTEN_STEPS:
            warnings.warn(
                f"{_FORGOTTEN_STEPS} optimizer steps in a row came without a loss, so adaptlr "
                "stands still: call controller.observe(loss) before optimizer.step(), or "
                "controller.step(loss) in its place",
                stacklevel=6,
            )

    def _adopt_groups(self) -> None:
        """Take in the groups that ``add_param_group`` has added: their lr is their peak."""
        made_steps, made_peaks = self._made
        peaks = self.config.peaks
        added = [float(group["lr"]) for group in self.optimizer.param_groups[len(peaks) :]]
        self.config.set_peaks([*peaks, *added])
        self._made = (made_steps, (*made_peaks, *added))
        self.path.adopt()
        self.path.configure()
        self.snapshots.notice()
        self._moments.look()

    # -- notices --------------------------------------------------------------

    def poll(self) -> None:
        """Heed what the device has said since; a plain read of host memory."""
        self.snapshots.catch_up()
        notices = self.path.core.notices
        if notices & self.path.unheeded:
            self.heed(notices)

    def heed(self, notices: int) -> None:
        """Warn once of what the host must hear of; after the end, raise `TrainingDiverged`."""
        new = notices & self.path.unheeded
        if new & Flag.ENDED and not self._is_over():
            new &= ~int(Flag.ENDED)  # of before the run was extended
        self.path.unheeded &= ~(new & _TOLD_ONCE)
        if new & Flag.ENDED:
            warnings.warn(
                f"total_steps={self.config.total_steps} are over; the last non-zero learning rate "
                "is kept. Call extend(total_steps) to stretch the schedule",
                stacklevel=6,
            )
        if new & Flag.OVERWRITTEN:
            warnings.warn(
                f"{self._other_writer()} writes the optimizer's learning rate as well as adaptlr; "
                "adaptlr's value wins in every step. Remove the other",
                stacklevel=6,
            )
        if new & Flag.FAR_LR:
            self._warn_of_far_lr()
        if new & EVENT:
            self._tell_events()
        if new & FAILED:
            self.fail()

    def catch_up(self) -> None:
        """Tell the user's callbacks what has happened since."""
        self.snapshots.catch_up()
        if self._on_event is not None:
            self._tell_events()

    def _tell_events(self) -> None:
        rows = self.path.core.events(0)
        events = make_events(rows)
        new = [
            event for event, row in zip(events, rows, strict=True) if row["sequence"] > self._told
        ]
        self._told = int(rows["sequence"][-1]) if len(rows) else self._told
        for event in new:
            self._on_event(event)  # type: ignore[misc]

    def _is_over(self) -> bool:
        rows, total_steps = self.path.core.newest(), self.config.total_steps
        return total_steps is not None and len(rows) > 0 and bool(rows["step"][0] >= total_steps)

    def _warn_of_far_lr(self) -> None:
        """Warn of the typed lr; a restart on account of the first gradient has the same flag."""
        for told in (event.reason for event in self.events() if event.kind == "far_lr"):
            warnings.warn(
                f"{told}. The run goes on as asked; lr='auto' searches for a rate, and "
                "check_lr=False silences this",
                stacklevel=7,
            )

    def _other_writer(self) -> str:
        scheduled = hasattr(self.optimizer.step, "_wrapped_by_lr_sched")
        return "a torch LRScheduler" if scheduled else "something else (a scheduler or callback)"

    def fail(self) -> None:
        """Raise `TrainingDiverged` with the story of what happened."""
        self.failure_told = True
        told = "\n".join(f"  step {e.step}: {e.reason}" for e in self.events()[-_TOLD_EVENTS:])
        raise TrainingDiverged(
            f"the guard has ended the run:\n{told}\n"
            f"{self._what_is_left()} Try a smaller lr or gradient clipping, and look at the "
            "batches of these steps; Guard(max_consecutive_skips=..., max_restarts=...) goes on "
            "for longer."
        )

    def _what_is_left(self) -> str:
        rows = self.path.core.events(0)  # none, if a run that had failed was resumed
        if len(rows) and restored_slot(rows[-1]):
            return "The parameters are those of the last good snapshot."
        return "The parameters are those of the last step taken."

    # -- events ---------------------------------------------------------------

    def events(self) -> list[Event]:
        """Return what the control step did, and what was asked of it, oldest first."""
        events = make_events(self.path.core.events(0))
        return sorted([*self.own_events, *events], key=lambda event: event.step)

    def say(self, kind: str, reason: str, *, step: int, lr: float, factor: float) -> None:
        """Add an event of the host's own."""
        self.own_events.append(Event(step, kind, reason, lr, factor))
        logger.info("step %d: %s", step, reason)

    def reconfigured(self) -> None:
        """Hand a changed config to the path; an extended run may end anew."""
        self.path.unheeded |= int(Flag.ENDED)
        self.path.configure()

    # -- checkpoints ----------------------------------------------------------

    def checkpoint(self) -> torch.Tensor:
        """Return all that is needed to resume, as one tensor. Waits for the device."""
        made_steps, made_peaks = self._made
        return pack(
            Checkpoint(
                made_steps=made_steps,
                total_steps=self.config.total_steps or 0,
                made_peaks=made_peaks,
                peaks=tuple(self.config.peaks),
                state=self.path.state(),
            )
        )

    def entries(self, snapshots: bool) -> dict[str, Any]:
        """Return what a state dict holds of the controller. Waits for the device."""
        entries: dict[str, Any] = {KEY: self.checkpoint()}
        saved = self.snapshots.saved() if snapshots else None
        if saved is not None:
            entries[SNAPSHOTS_KEY] = pack_slots(saved)
        return entries

    def save(self, state_dict: dict[str, Any]) -> None:
        """Add the state to the optimizer's, whose lr and flags are shown as the user knows them."""
        for index, group in enumerate(state_dict["param_groups"]):
            group.update(self.path.saved_group(index))
        state_dict["param_groups"][0].update(self.entries(self.saves_snapshots))

    def check(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Refuse a state that cannot be taken, before the optimizer has changed anything.

        Returns:
            The state dict without snapshots, of which torch would make a copy.
        """
        first, *others = state_dict.get("param_groups") or [{}]
        is_ours = first.get(KEY) is not None
        self._loading = self.checked(first, state_dict.get("state")) if is_ours else None
        if SNAPSHOTS_KEY not in first:
            return state_dict
        first = {key: value for key, value in first.items() if key != SNAPSHOTS_KEY}
        return {**state_dict, "param_groups": [first, *others]}

    def checked(self, entries: dict[str, Any], coming: dict[Any, Any] | None = None) -> Loading:
        """Read saved entries and try them on a copy of the config; raise if they cannot be taken.

        Args:
            entries: As `entries` has made them.
            coming: The optimizer's state, if that is about to be loaded as well.
        """
        checkpoint = unpack(entries[KEY], len(self.optimizer.param_groups))
        self._apply(checkpoint, copy.copy(self.config))
        packed = entries.get(SNAPSHOTS_KEY)
        if packed is None:
            return Loading(checkpoint, None)
        return Loading(checkpoint, self.snapshots.checked(packed, checkpoint.state, coming))

    def load(self) -> None:
        """Take the state out of the optimizer's, which has just replaced its groups."""
        for group in self.optimizer.param_groups:
            for key in (KEY, SNAPSHOTS_KEY):
                group.pop(key, None)
        loading, self._loading = self._loading, None
        if loading is None:
            self.snapshots.accept(None)
            warnings.warn(
                "the loaded optimizer state holds no adaptlr state; the controller goes on from "
                f"its own step {int(self.path.state()['step'])}",
                stacklevel=4,
            )
        else:
            self.restore(loading)
        self.path.bind()
        self.snapshots.reload(self.start_step)
        self._moments.look()

    def _apply(self, checkpoint: Checkpoint, config: ResolvedConfig) -> None:
        """Let `extend` and `set_peak` survive; a constructor that was told differently wins."""
        made_steps, made_peaks = self._made
        if checkpoint.made_steps == made_steps:
            config.extend(checkpoint.total_steps or None)
        # A search has found its peak as a share of the typed one.
        if checkpoint.made_peaks == made_peaks or config.search_steps >= 0:
            config.set_peaks(checkpoint.peaks)

    def restore(self, loading: Loading) -> None:
        """Go on from a checkpoint that was `checked`."""
        self._apply(loading.checkpoint, self.config)
        self.path.drop()
        state = loading.checkpoint.state
        lack = self.snapshots.accept(loading.slots)
        if lack:
            state = _extension.resumed(self.config.row, state)
        self.path.configure(state)
        self.start_step = int(state["step"])
        if self.start_step == 0:
            return  # the state of a fresh run: Accelerate reloads it when it prepares an optimizer
        lr, factor = float(state["lr"]), float(state["factor"])
        reason = resume_story(loading, state, lack)
        self.say("resume", reason, step=self.start_step, lr=lr, factor=factor)
