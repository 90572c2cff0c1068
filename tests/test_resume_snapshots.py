"""Checkpoints that hold snapshots: a run resumed with them equals one that never stopped."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from closed_loop import PEAK, STEPS, Model, Weights, jump
from conftest import loss_of, train
from test_snapshot import FIRST, OPTIMIZERS, SECOND, START, Prodigious, equal, force, frozen, step

from adaptlr import AdaptiveLR, Guard, Phase, TrainingDiverged, _extension

KEY, SNAPSHOTS = "adaptlr", "adaptlr_snapshots"


class Run:
    """AdamW on parameters with given gradients; the loss is that of a model in `closed_loop`.

    What the model's loss depends on lies in a buffer, which changes with every update.
    """

    def __init__(self, model: Model, scale: float = 1.0, start: float = 1.0, **options: Any):
        self.model, self.clock = model, 0
        self.module = torch.nn.Module()
        self.module.weight = torch.nn.Parameter(torch.full((3,), start))
        self.module.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
        self.optimizer = torch.optim.AdamW([self.module.weight], lr=PEAK)
        self.optimizer.register_step_post_hook(self.note_update)
        self.rollbacks: list[int | None] = []
        self.controller = AdaptiveLR(
            self.optimizer,
            STEPS,
            decay="constant",
            model=self.module,
            on_rollback=self.rollbacks.append,
            **options,
        )
        self.draws = np.random.default_rng(5).standard_normal(STEPS)
        generator = torch.Generator().manual_seed(0)
        self.gradients = scale * torch.randn(STEPS, 3, generator=generator)

    def weights(self) -> Weights:
        return Weights(*self.module.seen.tolist())

    def note_update(self, *_: object) -> None:
        if self.module.weight.grad is None:
            return
        weights = self.weights()
        self.model.update(self.clock, self.optimizer.param_groups[0]["lr"] / PEAK, weights)
        self.module.seen.copy_(torch.tensor([weights.progress, weights.damage]))

    def advance(self, end: int) -> None:
        while self.clock < end:
            self.module.weight.grad = self.gradients[self.clock].clone()
            draw = float(self.draws[self.clock])
            self.controller.step(self.model.loss(self.clock, self.weights(), draw))
            self.clock += 1

    def facts(self) -> dict[str, Any]:
        """Return all that the coming steps depend on."""
        return {
            "module": {name: value.clone() for name, value in self.module.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "controller": self.controller.state_dict(snapshots=True),
        }


def through_a_file(value: object) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# What the run is, how far it is followed, and the phases that it goes through.
RUNS = {
    "rescue": (Model("above", critical=0.001, harm=1.0), {}, 400),
    "probes": (Model("flat_then_worse", height=0.0, shift=jump(0.12, 240)), {}, 490),
    "trial": (Model("mild", critical=0.3, speed=0.1, harm=0.05, most_damage=0.2), {}, 420),
    "search": (
        Model("too_high", critical=0.01, speed=0.2, height=2.0),
        {"lr": "auto", "scale": 1e4},
        420,
    ),
    "raise": (
        Model("slow", critical=200.0, noise=0.02, later_critical=0.01, turn=270, harm=1.0),
        {"guard": Guard(max_factor=100.0, max_restarts=1)},
        278,
    ),
    "failed": (Model("hopeless", critical=1e-300, harm=1.0), {}, 80),
}
PHASES = {
    "rescue": "RUN RESCUE REWARM HOLD REGROW TRIAL TEST",
    "probes": "RUN TEST PROBE SHIFT",
    "trial": "RUN TRIAL TEST",
    "search": "SEARCH RUN PROBE REWARM HOLD REGROW",
    "raise": "RUN RAISE REWARM",
    "failed": "RUN RESCUE",
}


def made(name: str, **options: Any) -> Run:
    model, settings, _ = RUNS[name]
    return Run(model, **{"check_lr": False, **settings, **options})


@functools.cache
def uninterrupted(name: str) -> Run:
    run = made(name)
    run.advance(RUNS[name][2])
    return run


def stops_of(name: str) -> list[int]:
    """Return the step after each phase has begun, and one in its midst."""
    phases = uninterrupted(name).controller.history()["phase"]
    begins = [0, *(np.flatnonzero(np.diff(phases)) + 1).tolist(), len(phases)]
    stops = {begin + 1 for begin in begins[:-1]}
    stops |= {(begin + end) // 2 for begin, end in itertools.pairwise(begins)}
    return sorted(stops - {0, len(phases)})


def assert_goes_on_alike(resumed: Run, name: str, stop: int) -> None:
    expected = uninterrupted(name)
    resumed.advance(RUNS[name][2])
    ours, theirs = expected.controller.history()[stop:], resumed.controller.history()
    for field in set(ours.dtype.names or ()) - {"sequence", "checksum"}:
        np.testing.assert_array_equal(ours[field], theirs[field], err_msg=f"{field}, from {stop}")
    assert equal(resumed.facts(), expected.facts()), stop
    later = expected.rollbacks[len(expected.rollbacks) - len(resumed.rollbacks) :]
    assert resumed.rollbacks == later, stop


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumed_with_its_snapshots_equals_one_that_never_stopped(name):
    phases = {Phase(int(phase)).name for phase in uninterrupted(name).controller.history()["phase"]}
    assert phases == set(PHASES[name].split())
    run = made(name)
    for stop in stops_of(name):
        run.advance(stop)
        saved = through_a_file(run.facts())
        resumed = made(name, start=0.0)
        resumed.module.load_state_dict(saved["module"])
        resumed.optimizer.load_state_dict(saved["optimizer"])
        resumed.controller.load_state_dict(saved["controller"])
        resumed.clock = stop
        reason = resumed.controller.events()[-1].reason
        assert reason == f"resumed at step {stop} with its snapshots"
        assert_goes_on_alike(resumed, name, stop)


def test_a_run_that_has_failed_stays_so():
    run = made("failed")
    with pytest.raises(TrainingDiverged):
        run.advance(STEPS)
    saved = run.facts()
    resumed = made("failed")
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.controller.load_state_dict(saved["controller"])
    resumed.clock = run.clock
    with pytest.raises(TrainingDiverged):
        resumed.advance(run.clock + 2)


@pytest.mark.parametrize("when", ["attached", "loaded first"])
@pytest.mark.parametrize("stop", [20, 300])
def test_the_optimizer_s_state_dict_carries_them_where_asked(when, stop):
    run = made("rescue", save_snapshots=True)
    run.advance(stop)
    saved = through_a_file((run.module.state_dict(), run.optimizer.state_dict()))
    assert SNAPSHOTS in saved[1]["param_groups"][0]
    resumed = made("rescue", start=0.0)
    if when == "loaded first":
        resumed.controller.detach()
    resumed.optimizer.load_state_dict(saved[1])
    resumed.module.load_state_dict(saved[0])  # in this order, too
    if when == "loaded first":
        resumed.controller = AdaptiveLR(
            resumed.optimizer,
            STEPS,
            decay="constant",
            model=resumed.module,
            check_lr=False,
            on_rollback=resumed.rollbacks.append,
        )
    assert set(resumed.optimizer.param_groups[0]).isdisjoint({KEY, SNAPSHOTS})
    resumed.clock = stop
    assert_goes_on_alike(resumed, "rescue", stop)


def test_slots_in_host_memory_are_taken_in_as_well():
    run = made("rescue", snapshot="host")
    run.advance(300)
    saved = run.facts()
    resumed = made("rescue", snapshot="host")
    resumed.module.load_state_dict(saved["module"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.controller.load_state_dict(saved["controller"])
    resumed.clock = 300
    assert equal(resumed.controller.state_dict(snapshots=True), saved["controller"])
    assert_goes_on_alike(resumed, "rescue", 300)


def snapshot_of(optimizer: torch.optim.Optimizer) -> dict:
    """Return all of a slot: parameters, state, and numbers that the optimizer keeps in groups."""
    group = optimizer.param_groups[0]
    return {**frozen(optimizer), "numbers": (group.get("k"), group.get("d"))}


@pytest.mark.parametrize("name", [*OPTIMIZERS, "Prodigious"])
def test_every_optimizer_s_state_comes_back(name, make_model, batches):
    def fresh(seed: int = 0):
        model = make_model(seed)
        make = {**OPTIMIZERS, "Prodigious": Prodigious}[name]
        optimizer = make(model.parameters())
        return model, optimizer, AdaptiveLR(optimizer, total_steps=100, save_snapshots=True)

    def go(controller, model, batch):
        if name == "LBFGS":
            return step(controller, model, batch)
        train(controller, model, [batch])

    model, optimizer, controller = fresh()
    for index in range(8):
        if index == 4:
            force(controller, save=FIRST)
        go(controller, model, batches[index])
        if index == 4:
            kept = snapshot_of(optimizer)
    state = controller._path.core.state
    state["good_slot"] = FIRST
    controller._path.core.state = state
    saved = through_a_file((model.state_dict(), optimizer.state_dict()))
    other, its_optimizer, resumed = fresh(seed=1)
    its_optimizer.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    force(resumed, restore=FIRST)
    go(resumed, other, batches[8])
    assert equal(snapshot_of(its_optimizer), kept)


def test_what_is_not_asked_for_or_not_there_is_not_in_it(make_model, batches):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=100, save_snapshots=True)
    assert set(controller.state_dict(snapshots=True)) == {KEY}
    assert SNAPSHOTS not in optimizer.state_dict()["param_groups"][0]
    train(controller, model, batches[:2])
    assert set(controller.state_dict()) == {KEY}
    assert set(controller.state_dict(snapshots=True)[SNAPSHOTS]["slots"]) == {START}


def test_a_checkpoint_is_no_view_of_the_slots():
    run = made("rescue")
    run.advance(300)
    saved = run.controller.state_dict(snapshots=True)
    kept = copy.deepcopy(saved)
    run.advance(400)
    assert equal(saved, kept)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"guard": Guard(mode="observe")}, "which this run does not keep"),
        ({"snapshot": "off"}, "which this run does not keep"),
        ({}, "for which there is no room now"),
    ],
)
def test_a_run_that_cannot_keep_them_says_so(options, why, monkeypatch):
    run = made("rescue")
    run.advance(300)
    assert run.controller.status().phase is Phase.TEST
    saved = run.facts()
    resumed = made("rescue", **options)
    if not options:
        monkeypatch.setattr("adaptlr.snapshot.free_host_bytes", lambda: 0)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.controller.load_state_dict(saved["controller"])
    reason = resumed.controller.events()[-1].reason
    assert reason.startswith("resumed at step 300 without the checkpoint's snapshots; the test ")
    assert why in reason


# -- what is refused ---------------------------------------------------------------------------


def changed(packed: dict, *path: Any, value: Any) -> dict:
    """Return a copy with one entry replaced, or taken out if the value is None."""
    packed = copy.deepcopy(packed)
    place = functools.reduce(lambda part, key: part[key], path[:-1], packed)
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return packed


SLOT = ("slots", START)
DAMAGE = {
    "kind": (lambda p: [p], "entry must be a dict"),
    "version": (lambda p: changed(p, "version", value=2), "be of version 1, got 2"),
    "slot": (
        lambda p: changed(p, "slots", FIRST, value=None),
        r"of the slots \[1, 2, 3\], got \[1, 3\]",
    ),
    "slots": (lambda p: changed(p, "slots", value="three"), "of the slots"),
    "form": (lambda p: changed(p, *SLOT, "state", value=[1]), "dicts of weights, state, groups"),
    "step": (lambda p: changed(p, *SLOT, "step", value="soon"), "of a step that is an int"),
    "parameter": (lambda p: changed(p, *SLOT, "weights", 0, value=None), "a difference in 0"),
    "buffer": (lambda p: changed(p, *SLOT, "weights", "more", value=0), "a difference in more"),
    "shape": (
        lambda p: changed(p, *SLOT, "weights", 0, value=torch.zeros(4)),
        r"float32 \(3,\) in parameter 0, got float32 \(4,\)",
    ),
    "dtype": (
        lambda p: changed(p, *SLOT, "weights", "seen", value=torch.zeros(2)),
        r"float64 \(2,\) in buffer 'seen', got float32",
    ),
    "number": (lambda p: changed(p, *SLOT, "state", 1, value={}), "1 parameters, got state of"),
    "groups": (lambda p: changed(p, *SLOT, "groups", value=[]), "1 parameter groups, got 0"),
    "memory": (
        lambda p: changed(p, *SLOT, "state", 0, "exp_avg", value=torch.zeros(4)),
        r"of shape \(3,\) in the state, got \(4,\)",
    ),
    "states": (lambda p: changed(p, "states", value=torch.zeros(8)), "bytes of states, got 8"),
    "nan": (
        lambda p: changed(p, "states", value=torch.full_like(p["states"], 255)),
        "must be finite, got nan",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_corrupt_or_foreign_snapshots_are_refused_whole(name):
    damage, message = DAMAGE[name]
    run = made("rescue", save_snapshots=True)
    run.advance(300)
    saved = run.facts()
    assert set(saved["controller"][SNAPSHOTS]["slots"]) == {START, FIRST, SECOND}
    run.advance(310)
    before = run.facts()
    saved["controller"][SNAPSHOTS] = damage(saved["controller"][SNAPSHOTS])
    group = saved["optimizer"]["param_groups"][0]
    group[SNAPSHOTS] = damage(group[SNAPSHOTS])
    for load in (
        lambda: run.controller.load_state_dict(saved["controller"]),
        lambda: run.optimizer.load_state_dict(saved["optimizer"]),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            load()
    assert equal(run.facts(), before)
    run.advance(330)
    assert run.controller.history()["lr"].tolist() == (
        uninterrupted("rescue").controller.history()["lr"][:330].tolist()
    )


def test_saving_what_is_never_kept_is_refused(make_model):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="save_snapshots must be False with snapshot='off'"):
        AdaptiveLR(optimizer, 10, snapshot="off", save_snapshots=True)


def test_a_checkpoint_with_snapshots_loads_without_adaptlr(make_model, batches):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=100, save_snapshots=True)
    train(controller, model, batches[:5])
    plain = torch.optim.AdamW(make_model().parameters(), lr=0.5)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    assert equal(plain.state_dict()["state"], optimizer.state_dict()["state"])
    plain.step()
    assert plain.param_groups[0]["lr"] == controller.lr


def test_the_states_beside_the_slots_are_checked():
    core = made("rescue").controller._path.core
    assert core.saved.shape == (_extension.SAVED_STATES,)
    with pytest.raises(ValueError, match="expected 2 rows of State, got 1"):
        core.saved = core.saved[:1]


def test_frozen_parameters_need_no_copy(make_model, batches):
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=100)
    for batch in batches[:3]:
        loss = loss_of(model, batch)
        loss.backward()
        controller.step(loss)
    slot = controller.state_dict(snapshots=True)[SNAPSHOTS]["slots"][START]
    assert set(slot["weights"]) == {1, 2, 3}
    controller.load_state_dict(controller.state_dict(snapshots=True))
