"""`AdaptiveLR`: attaches to an optimizer and ties losses, decisions and telemetry together."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
import torch
from torch.compiler import is_dynamo_compiling

from adaptlr import compiled
from adaptlr.attach import (
    choose_path,
    estimate_suffices,
    refuse_raise,
    refuse_unavailable,
    resolve_plan,
    resolve_search,
)
from adaptlr.attachment import FAILED, Attachment
from adaptlr.checkpoint import KEY, unpack
from adaptlr.config import Decay, Guard, ResolvedConfig, Search, require
from adaptlr.events import Event
from adaptlr.first_gradient import FirstGradient, has_taken_no_step
from adaptlr.hooks import Hooks, unwrap
from adaptlr.placement import SNAPSHOTS
from adaptlr.recorder import Recorder, open_recorder
from adaptlr.saved_slots import SNAPSHOTS_KEY
from adaptlr.snapshot import Snapshots
from adaptlr.telemetry import Status, initial_status, make_status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("adaptlr")

_attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def is_attached(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has a controller."""
    return optimizer in _attached


class AdaptiveLR:
    """Controls the learning rate of a torch optimizer: warm-up, decay, skips, backoff, regrowth.

    Attaches by hooks; the optimizer stays the user's own object and may be stepped by whoever owns
    the loop. The learning rate of a group is its peak x the guard's factor x the schedule, written
    before every step.

    Args:
        optimizer: Any `torch.optim.Optimizer`, also inside Accelerate's or Lightning's wrapper.
        total_steps: Optimizer steps of the run, at least 1; ``None`` only for decays without an end
            (``"constant"``, ``"inverse_sqrt"``).
        lr: Peak of the largest group; the others keep their ratios to it. ``None``: every group's
            own (its ``initial_lr`` where a scheduler has left one). ``"auto"``: the first steps
            look for it and are undone; what the optimizer was given then matters for the groups'
            ratios only. Needs a guard that acts; without snapshots the first gradient decides
            alone.
        warmup: Linear warm-up, in steps (int) or as a share of the run (float). Large batches and
            adapters do well with 0.03, full fine-tuning with 0.1, which is the default; where
            ``decay`` is a scheduler, that is 0, since the scheduler may have one of its own.
        decay: ``"cosine"``, ``"linear"``, ``"constant"``, ``"wsd"``, ``"inverse_sqrt"``,
            ``"cosine_restarts"``, a `Schedule` with parameters, a callable ``step -> multiplier``,
            or a scheduler of torch or transformers that has not been stepped, and should not be.
            The last two are tabulated once and take over after warm-up.
        min_lr_ratio: Where the decay ends, as a share of the peak, in [0, 1].
        guard: What to do about trouble (`Guard`); ``None`` switches it off: the learning rate is
            then a function of the step alone.
        device_path: ``"fused"``: lr and skip flag are read on the CUDA device by torch's fused
            kernels; ``"capturable"``: lr is, and a skip zeroes the gradients; ``"float"``: lr stays
            a Python float. ``"auto"`` takes the first of these that the optimizer can.
        history_size: Records kept for `history`, at least 1; 128 bytes each.
        snapshot: Where copies of weights and optimizer state are kept for rollbacks, three at
            most: ``"device"``, ``"host"`` (slower, and no device memory), or ``"off"``: the guard
            then skips, cuts, zeroes the first moment and re-warms, and cannot undo. ``"auto"``
            takes the first of these that they fit into a quarter of; before it gives up, it keeps
            the start of the run alone. Made at the first step, and only for a guard that acts.
        model: For models with buffers (BatchNorm): they are part of the copies.
        save_snapshots: Whether ``optimizer.state_dict()`` carries the copies as well, for
            checkpoints that somebody else writes, such as a Trainer. They grow by up to three times
            the weights and the optimizer's state; a run that is resumed in a search or an
            experiment then goes on with it. See `state_dict` for a single checkpoint.
        on_event: Called on the host with every `Event` of the guard, to log it or to wake somebody.
            With decisions on a CUDA device when the host hears of it, as for ``on_rollback``.
        on_rollback: Called on the host after a rollback with the number of steps behind the weights
            that are back, None if not known; to rewind what is yours. With decisions on a CUDA
            device it is called when the host hears of it, `Status.lag` steps late, and during
            replays of a graph in `check` or `status`.
        search: How ``lr="auto"`` goes about it (`Search`).
        check_lr: Whether the first step compares a typed lr with what the first gradient suggests:
            one warning if it is more than 60 times off, and a place to restart from if it fails.
            For optimizers whose steps are known (Adam's and SGD's kin), when they are new.
        recorder: A `Recorder`, or the path of its file: what happens is written there while the run
            goes on, for ``adaptlr report`` and ``adaptlr watch``.
        process_group: Not available in this version.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if an argument is out of range, or not available.
        RuntimeError: if the optimizer already has a controller, if several processes train and
            ``guard`` is not None, during the capture of a CUDA graph, or if the recorder has
            a controller already.
        OSError: if the recorder's file cannot be written.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> controller = AdaptiveLR(optimizer, total_steps=100)
        >>> for _ in range(100):
        ...     loss = model(torch.ones(8, 4)).pow(2).mean()
        ...     loss.backward()
        ...     controller.step(loss)
        ...     controller.zero_grad()
        >>> controller.status().step
        100
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        lr: float | Literal["auto"] | None = None,
        warmup: float | None = None,
        decay: Decay = "cosine",
        min_lr_ratio: float = 0.0,
        guard: Guard | None = Guard(),  # noqa: B008 (frozen)
        device_path: Literal["auto", "fused", "capturable", "float"] = "auto",
        history_size: int = 65536,
        search: Search | None = None,
        check_lr: bool = True,
        snapshot: Literal["auto", "device", "host", "off"] = "auto",
        model: torch.nn.Module | None = None,
        save_snapshots: bool = False,
        on_event: Callable[[Event], Any] | None = None,
        on_rollback: Callable[[int | None], Any] | None = None,
        process_group: None = None,
        recorder: Recorder | str | os.PathLike[str] | None = None,
    ) -> None:
        """Check everything, then attach."""
        refuse_unavailable(process_group=process_group)
        self._optimizer = unwrap(optimizer)
        if is_attached(self._optimizer):
            raise RuntimeError(
                "the optimizer already has a controller; call its detach() before attaching another"
            )
        _refuse_processes(guard)
        require(
            isinstance(history_size, int) and history_size >= 1,
            "history_size",
            "an int of at least 1",
            history_size,
        )
        require(snapshot in SNAPSHOTS, "snapshot", f"one of {SNAPSHOTS}", snapshot)
        require(
            not (save_snapshots and snapshot == "off"),
            "save_snapshots",
            "False with snapshot='off'",
            save_snapshots,
        )
        _check_callables(model, on_event=on_event, on_rollback=on_rollback)
        refuse_raise(lr, guard, snapshot)
        plan = resolve_plan(self._optimizer, lr, warmup, decay, total_steps)
        loaded = self._optimizer.param_groups[0].get(KEY)  # a checkpoint that came before us
        if loaded is not None and lr is None:
            plan = plan._replace(peaks=list(unpack(loaded, len(plan.peaks)).made_peaks))
        search = resolve_search(self._optimizer, lr, search, guard, snapshot)
        config = ResolvedConfig(
            total_steps=total_steps,
            warmup=plan.warmup,
            decay=plan.decay,
            min_lr_ratio=min_lr_ratio,
            guard=guard,
            peaks=plan.peaks,
            search=search,
            estimate_suffices=estimate_suffices(self._optimizer, search, total_steps),
        )
        self._recorder = None if recorder is None else open_recorder(recorder)
        self._history_size = history_size
        self._reduction: str = "mean"
        is_fresh = has_taken_no_step(self._optimizer)
        try:
            self._path = choose_path(self._optimizer, config, history_size, device_path)
        except BaseException:
            if self._recorder is not None and self._recorder is not recorder:
                self._recorder.close()  # a traceback would keep it open, and its file locked
            raise
        snapshots = Snapshots(self._optimizer, model, config, self._path, snapshot, on_rollback)
        asked = is_fresh and (check_lr or config.search_steps >= 0)
        gradient = FirstGradient(self._optimizer, config, self._path, asked)
        self._attachment = Attachment(
            self._optimizer, config, self._path, snapshots, gradient, on_event, save_snapshots
        )
        self._begin_recording(config)
        self._hooks = Hooks(self._optimizer, self._attachment)
        self._handle = compiled.register(self)
        _attached.add(self._optimizer)
        if loaded is not None:
            group = self._optimizer.param_groups[0]
            keys = [key for key in (KEY, SNAPSHOTS_KEY) if key in group]
            self.load_state_dict({key: group.pop(key) for key in keys})

    def _begin_recording(self, config: ResolvedConfig) -> None:
        if self._recorder is None:
            return
        from adaptlr.run_facts import run_facts  # most runs do without it

        facts = run_facts(self._optimizer, config, self._path)
        self._recorder.attach(self._path.core, self._attachment.own_events, facts)

    # -- the loop -------------------------------------------------------------

    def observe(
        self,
        loss: torch.Tensor | float | None = None,
        *,
        grad_norm: torch.Tensor | float | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        """Hand over the loss of one micro-batch; the next optimizer step decides on all of them.

        Call after the forward pass and before ``optimizer.step()``. Does not wait for the device.

        Args:
            loss: Raw loss, not a smoothed one; one element, any floating dtype, on the parameters'
                device. NaN and inf are valid observations: the step will be skipped.
            grad_norm: Global gradient norm before clipping, one element, as `clip_grad_norm_`
                returns it; of a DTensor the full norm is taken, which all ranks do together. If it
                is not finite, the step is skipped; if it is far above its level, the step's flags
                have NORM_SPIKE, and nothing else is done about it.
            reduction: ``"mean"`` averages the losses of a step; ``"sum"`` adds them up, where the
                loop has already divided each by the number of micro-batches.

        Raises:
            TypeError: if ``loss`` is no tensor or float.
            ValueError: if ``loss`` has several elements or is on another device.
            TrainingDiverged: if the guard has ended the run.
        """
        if is_dynamo_compiling():
            return compiled.observe(self._handle, loss, grad_norm, reduction)
        if reduction is not self._reduction:
            self._change_reduction(reduction)
        if loss is not None:
            self._path.observe(loss)
        if grad_norm is not None and not self._path.suspended:
            self._path.observe_grad_norm(grad_norm)

    def step(
        self,
        loss: torch.Tensor | float | None = None,
        *,
        closure: Callable[[], Any] | None = None,
        grad_norm: torch.Tensor | float | None = None,
    ) -> Any:
        """Observe ``loss`` if given, then step the optimizer.

        Args:
            loss: As for `observe`. May be omitted if it was observed before.
            closure: Handed to ``optimizer.step``; if nothing was observed, what it returns is the
                loss.
            grad_norm: As for `observe`.

        Returns:
            What ``optimizer.step`` returns.

        Raises:
            TypeError: if ``loss`` is callable.
            RuntimeError: if no loss was observed and there is no closure.
            TrainingDiverged: if the guard has ended the run; the parameters are unchanged.
        """
        if loss is not None or grad_norm is not None:
            if callable(loss) and not isinstance(loss, torch.Tensor):
                raise TypeError("loss must be a tensor, got a callable; pass it as closure=...")
            self.observe(loss, grad_norm=grad_norm)
        if closure is not None:
            return self._optimizer.step(closure)
        if self._path.count == 0 and not (self._path.suspended or self._path.is_capturing()):
            raise RuntimeError(
                "step needs a loss: pass step(loss), call observe(loss) before, or pass closure=..."
            )
        return self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the losses of a step that was never taken.

        Args:
            set_to_none: As for the optimizer's own ``zero_grad``.
        """
        if self._path.count and self._path.gradients_cleared():
            logger.debug("dropped the loss of a step that the optimizer never took")
            self._path.drop()
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def _change_reduction(self, reduction: str) -> None:
        require(reduction in ("mean", "sum"), "reduction", "'mean' or 'sum'", reduction)
        if reduction == self._reduction:
            return
        if self._path.count:
            raise ValueError("reduction must be the same for all losses of a step")
        if self._path.replayed:
            raise ValueError(
                f"reduction must be the one that was captured, got {reduction!r}: call "
                "observe(reduction=...) once before the capture"
            )
        self._path.mean = reduction == "mean"
        self._reduction = reduction

    # -- telemetry ------------------------------------------------------------

    @property
    def lr(self) -> float:
        """Learning rate of the largest group in the last reported step; read without waiting."""
        row = self._newest()
        return self._coming_lr() if row is None else float(row["lr"])

    def _newest(self) -> npt.NDArray[Any] | None:
        rows = self._path.core.newest()
        return rows[0] if len(rows) else None

    def _coming_lr(self) -> float:
        """Return what the first step will be given, before there is a record."""
        config = self._attachment.config
        return float(config.row["peak"]) * config.multiplier(self._attachment.start_step)

    def status(self) -> Status:
        """Return the newest record, read without waiting for the device.

        Raises:
            TrainingDiverged: if the guard has ended the run and this was not told yet.
        """
        core = self._path.core
        self._attachment.catch_up()
        if core.notices & FAILED and not self._attachment.failure_told:
            self._attachment.fail()
        row = self._newest()
        if row is None:
            return initial_status(self._attachment.start_step, self._coming_lr())
        dropped = max(core.written - self._history_size, 0) + core.dropped_events
        return make_status(row, self._path.lag, dropped)

    def history(self) -> npt.NDArray[Any]:
        """Return the flight record, oldest first, without waiting for the device.

        A structured array, one record a step, at most the last ``history_size``. Its fields are
        those of ``Record`` in csrc/state.h, ``step``, ``loss``, ``level`` and ``lr`` among them.
        """
        return self._path.core.records(0)

    def events(self) -> list[Event]:
        """Return what the controller did and why, oldest first, without waiting for the device."""
        return self._attachment.events()

    def plot(self) -> Figure:
        """Draw loss, learning rate and slope with the events, as far as `history` reaches.

        Does not wait for the device. Notebooks show the figure; elsewhere ``savefig`` writes it.

        Returns:
            A figure of matplotlib, without pyplot.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            ValueError: before the first step.
        """
        from adaptlr.plot import plot

        return plot([("", self.history(), self.events())])

    def check(self) -> None:
        """Raise `TrainingDiverged` if the guard has ended the run: for loops over a graph."""
        self._attachment.catch_up()
        if self._path.core.notices & FAILED:
            self._attachment.fail()

    def __repr__(self) -> str:
        """Show the length of the run, where it stands, and the path taken."""
        total_steps = self._attachment.config.total_steps
        return (
            f"AdaptiveLR(total_steps={total_steps}, lr={self.lr:.3g}, "
            f"device_path={self._path.name!r})"
        )

    # -- changing course ------------------------------------------------------

    def set_peak(self, lr: float) -> None:
        """Set the peak of the largest group, from the next step on; the others keep their ratios.

        It takes the place of one that a search has found; during a search it has no effect.

        Raises:
            ValueError: if ``lr`` is not positive and finite.
        """
        require(0.0 < lr < float("inf"), "lr", "positive and finite", lr)
        config = self._attachment.config
        old = float(config.row["peak"])
        config.set_peaks([peak * (lr / old) for peak in config.peaks])
        self._changed("set_peak", f"peak learning rate set to {lr:g} (it was {old:g})")

    def extend(self, total_steps: int | None) -> None:
        """Stretch the schedule to ``total_steps``, from the next step on; warm-up steps stay.

        Raises:
            ValueError: if that is shorter than the warm-up.
        """
        config = self._attachment.config
        old = config.total_steps
        config.extend(total_steps)
        self._changed("extend", f"total_steps set to {total_steps} (it was {old})")

    def _changed(self, kind: str, reason: str) -> None:
        self._attachment.reconfigured()
        row = self._newest()
        step = self._attachment.start_step if row is None else int(row["step"]) + 1
        factor = 1.0 if row is None else float(row["factor"])
        self._attachment.say(kind, reason, step=step, lr=self.lr, factor=factor)

    # -- checkpoints ----------------------------------------------------------

    def state_dict(self, snapshots: bool = False) -> dict[str, Any]:
        """Return the controller's state alone. Waits for the device.

        The optimizer's own state dict carries the same, and with ``save_snapshots=True`` snapshots
        too: save one of the two.

        Args:
            snapshots: Whether copies of the snapshots are in it, on the CPU: up to three times the
                weights and the optimizer's state. A run that is resumed with them goes on within a
                search or an experiment, and can go back to what was good before; without them such
                a phase ends with the best rate so far, and the weights at hand are the start. Where
                there are none, before the first step for one, none are in it.
        """
        return self._attachment.entries(snapshots)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the weights and the optimizer's state before.

        Snapshots are used if it holds them, and are in place with the first step. `events` says so;
        it also says why, where this run cannot keep them.

        Raises:
            KeyError: if ``state_dict`` holds no controller.
            TypeError: if an entry is of the wrong kind.
            ValueError: if it is of another version, of other groups or parameters, or damaged.
                Nothing is changed then.
        """
        if KEY not in state_dict:
            raise KeyError(f"state_dict must have the entry {KEY!r}, got {sorted(state_dict)}")
        self._attachment.restore(self._attachment.checked(state_dict))
        self._attachment.snapshots.reload(self._attachment.start_step)

    def detach(self) -> None:
        """Take the hooks off, and give lr as a float and the user's own flags back.

        Waits for the device, and closes the recorder. `history`, `events` and `status` go on
        working.
        """
        self._hooks.remove()
        self._attachment.snapshots.release()
        self._path.release()
        if self._recorder is not None:
            self._recorder.close()
        _attached.discard(self._optimizer)

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context in which nothing is observed and every optimizer step is skipped.

        For the warm-up iterations that a CUDA graph needs before its capture: they leave the
        parameters and the clock as they are. A loss that was observed before is dropped.
        """
        return self._attachment.suspended()


def _check_callables(model: object, **callbacks: object) -> None:
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise TypeError(f"{name} must be callable or None, got {type(callback).__name__}")


def _refuse_processes(guard: Guard | None) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    world_size = distributed.get_world_size()
    if world_size > 1 and guard is not None:
        raise RuntimeError(
            "guard must be None where several processes train, got a Guard and a world of "
            f"{world_size}: ranks could decide differently, since losses are not reduced over "
            "them yet"
        )
