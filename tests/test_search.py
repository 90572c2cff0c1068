"""The search for a learning rate, and what the first gradient says of one that was typed."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from closed_loop import PEAK, Model, Scenario, steps_from
from test_graphs import capture
from test_update import assert_same, moves_of, run_loop, run_reference, to_structured

import adaptlr
from adaptlr import _extension as extension
from adaptlr import reference
from adaptlr.events import make_events
from adaptlr.reference import Flag, Phase
from adaptlr.reference_recovery import RAMP_DIVISOR
from adaptlr.reference_schedule import schedule

# Closed loops. The typed peak stands at 1, and `critical` is the rate that does harm.

STEPS = 300
SEARCH = {"search_steps": 60, "warmup_steps": 90, "chart_steps": 30.0, "snapshot_slots": 3}
TOO_HIGH = Model("too_high", critical=0.01, speed=0.2, height=2.0)
TOO_LOW = Model("too_low", critical=1e4, speed=0.2, height=2.0)
PLATEAU = Model("plateau", critical=0.01, speed=0.5, height=0.12, harm=0.05, most_damage=0.3)
FLAT = Model("flat", height=0.0)
SEARCHED = ("RUN>SEARCH", "SEARCH>RUN")
AGAIN = ("RUN>SEARCH", "SEARCH>SEARCH", "SEARCH>RUN")
NONE = 0.0


def told(rate: float, loss: float = 3.0) -> float:
    """Return what the first gradient must tell so that it suggests ``rate`` x the peak."""
    return PEAK * rate / loss


CASES = [
    # model, what the first gradient tells, moves, between which rates the peak must come to lie
    (TOO_HIGH, told(0.003), SEARCHED, (5e-4, 0.01)),
    (TOO_LOW, told(3e3), SEARCHED, (5e2, 1e4)),
    # The ramp is lowest at 0.01, far above the estimate: it counts as five estimates.
    (TOO_HIGH, told(1e-4), SEARCHED, (2.1e-4, 2.4e-4)),
    # The ramp is lowest at 0.006, by little: the estimate stays. If it is sure, less.
    (PLATEAU, told(0.0373, 1.12), SEARCHED, (0.036, 0.037)),
    (Model("cliff", critical=0.01, speed=0.6, height=2.0), told(0.05), SEARCHED, (0.009, 0.01)),
    (TOO_HIGH, NONE, AGAIN, (5e-4, 0.01)),
    (Model("unknown", critical=30.0, height=2.0), NONE, AGAIN, (1.0, 30.0)),
    (FLAT, told(0.02, 1.0), SEARCHED, (0.01, 0.02)),
    (FLAT, NONE, SEARCHED, (1.0, 1.0)),
    # The estimate is far too high: even where the ramp begins the loss rises at once.
    (Model("beyond", critical=1e-5, harm=2.0, height=2.0), told(0.1), AGAIN, (1e-10, 1e-5)),
    (
        Model("nan", critical=0.01, height=2.0, broken=steps_from(20, 1)),
        told(0.003),
        SEARCHED,
        None,
    ),
    (
        Model("nans", critical=0.01, height=2.0, broken=steps_from(3, 3)),
        told(0.003),
        SEARCHED,
        None,
    ),
    (
        Model("poisoned", critical=0.01, height=2.0, poisoned=0.03),
        told(0.003),
        ("RUN>SEARCH", "SEARCH>RUN:NONFINITE"),
        (5e-4, 0.01),
    ),
    # A loss around 0 is no scale; the noise of 0.05 is.
    (
        Model("negative", critical=0.01, height=2.0, shift=lambda _: -3.0),
        told(0.003, 1.0),
        SEARCHED,
        (1e-4, 0.01),
    ),
    # A later cliff is the guard's.
    (
        Model("late", critical=0.01, height=2.0, later_critical=1e-6, turn=150, harm=1.0),
        told(0.003),
        (*SEARCHED, "REWARM>HOLD"),
        None,
    ),
]


@pytest.mark.parametrize(("model", "estimate", "moves", "bounds"), CASES)
def test_a_search_matches_the_reference_and_finds_a_rate(model, estimate, moves, bounds):
    config, signals, actual = run_loop(Scenario(model, moves, SEARCH), STEPS, estimate)
    made = moves_of(actual[0])
    seen = iter(made)
    assert not [
        move for move in moves if not any(m.split(":")[0] == move.split(":")[0] for m in seen)
    ], made
    assert_same(actual, run_reference(config, signals, 1, estimate), loss_unit=1.0)
    found = actual[0][(actual[0]["flags"] & Flag.FOUND) != 0]
    assert len(found) == 1
    assert found["step"][0] < SEARCH["search_steps"]
    if bounds is not None:
        assert bounds[0] <= found["target_factor"][0] <= bounds[1] * (1 + 1e-12)


@pytest.mark.parametrize("offset", [0.0, -1.0])
def test_a_noisy_loss_is_its_own_scale_unless_it_crosses_zero(offset):
    """The squared error of one example is as noisy as high, and never negative."""
    losses = np.random.default_rng(3).chisquare(1, 9) + offset
    config = reference.default_config(STEPS, PEAK, **SEARCH)
    controller = extension.HostController(to_structured(config)[0], history_size=64)
    state = controller.state
    state["estimate"] = told(0.01, 1.0)
    controller.state = state
    for loss in losses:
        controller.step(float(loss))
    after = controller.state
    level, noise, first = after["fine.fast_level"], after["fine.noise"], abs(losses[0])
    assert level < 3 * noise
    scale = 30 * noise if offset else np.sqrt(level * first)
    assert after["estimate"] == pytest.approx(0.01 * scale)


@pytest.mark.parametrize(
    ("settings", "estimate", "factor"),
    [
        ({"search_steps": 0}, told(0.03), 0.03),
        ({"search_steps": 0}, NONE, 1.0),
        ({"search_steps": 60, "snapshot_slots": 0}, told(0.03), 0.03),
    ],
)
def test_without_a_ramp_the_first_gradient_decides_alone(settings, estimate, factor):
    scenario = Scenario(TOO_HIGH, (), {"snapshot_slots": 3, **settings})
    config, signals, actual = run_loop(scenario, 60, estimate)
    assert_same(actual, run_reference(config, signals, 1, estimate), loss_unit=1.0)
    assert actual[0]["target_factor"][0] == pytest.approx(factor, rel=0.1)
    assert not np.any(actual[0]["phase"] == Phase.SEARCH)


@pytest.mark.parametrize(
    ("model", "estimate", "kinds"),
    [
        (TOO_HIGH, told(0.003), ()),
        (TOO_HIGH, NONE, AGAIN),  # nothing was told
        (Model("negative", critical=0.01, shift=lambda _: -3.0), told(0.003), ("RUN>SEARCH",)),
    ],
)
def test_an_estimate_that_suffices_takes_no_ramp(model, estimate, kinds):
    scenario = Scenario(model, kinds, {**SEARCH, "estimate_suffices": 1})
    config, signals, actual = run_loop(scenario, STEPS, estimate)
    assert_same(actual, run_reference(config, signals, 1, estimate), loss_unit=1.0)
    assert [move for move in moves_of(actual[0]) if "SEARCH" in move][: len(kinds)] == list(kinds)
    assert bool(kinds) == np.any(actual[0]["phase"] == Phase.SEARCH)


def test_a_typed_rate_far_above_the_estimate_restarts_there():
    model = Model("above", critical=0.001, harm=1.0)
    scenario = Scenario(model, ("RUN>REWARM:LOST|ABOVE",))
    config, signals, actual = run_loop(scenario, 200, told(0.0008, 2.0))
    assert_same(actual, run_reference(config, signals, 1, told(0.0008, 2.0)), loss_unit=1.0)
    records = actual[0]
    assert moves_of(records)[0] == "RUN>REWARM:LOST|ABOVE"
    restart = records[records["phase"] == Phase.REWARM][0]
    assert restart["target_factor"] == pytest.approx(0.0008, rel=0.1)
    assert int(records["flags"][0]) & Flag.FAR_LR


@pytest.mark.parametrize(("estimate", "factor"), [(0.25, 0.5), (0.12, 0.346), (0.4, None)])
def test_a_test_that_tells_nothing_leaves_the_word_to_the_first_gradient(estimate, factor):
    scenario = Scenario(FLAT, ("RUN>TEST",), {"snapshot_slots": 3})
    config, signals, actual = run_loop(scenario, 300, told(estimate, 1.0))
    assert_same(actual, run_reference(config, signals, 1, told(estimate, 1.0)), loss_unit=1.0)
    records = actual[0]
    ended = records[(records["previous_phase"] == Phase.TEST) & (records["phase"] != Phase.TEST)][0]
    reason = make_events(np.array([ended]))[0].reason
    if factor is None:  # within three estimates
        assert ended["phase"] == Phase.RUN
        assert reason.startswith("the lower learning rate got no lower; the state set aside is")
        return
    assert ended["phase"] == Phase.REWARM
    assert int(ended["flags"]) & Flag.FAR_LR
    share = max(schedule(config, ended["step"] + config.rewarm_steps), 0.2)
    assert ended["target_factor"] == pytest.approx(min(factor / share, 0.5), rel=0.1)
    assert reason.startswith(
        f"the lower learning rate got no lower, and the first gradient suggests {ended['rise']:.2g}"
        "; weights and optimizer state from the start are put back, learning rate set to "
    )


def test_a_search_starts_where_the_gradient_says_whatever_was_typed():
    rates = []
    for peak in (1e-6, 1e-2, 1e2):
        row = np.zeros((), extension.config_dtype)
        config, signals, _ = run_loop(Scenario(TOO_HIGH, (), SEARCH), 5, told(0.003))
        for name, value in vars(config).items():
            row[name] = 0 if name in ("peaks", "table") else value
        row["peak"], row["peaks"][0] = peak, peak
        controller = extension.HostController(row, 64)
        state = controller.state
        state["estimate"] = told(0.003)
        controller.state = state
        for step_signals in signals:
            controller.step(step_signals.loss)
        rates.append(controller.records()["lr"].tolist())
    np.testing.assert_allclose(rates[1:], [rates[0]] * 2, rtol=1e-12)


# With a real optimizer.


class Task:
    """A small regression that SGD and AdamW can learn."""

    def __init__(self, kind: str, lr: float, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        ).to(device)
        self.optimizer = getattr(torch.optim, kind)(self.model.parameters(), lr=lr)
        self.random = torch.Generator().manual_seed(1)

    def batch(self) -> torch.Tensor:
        return torch.randn(32, 8, generator=self.random).to(self.device)

    def loss(self, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.batch() if x is None else x
        return (self.model(x).squeeze(1) - torch.sin(2 * x[:, 0]) - 2).pow(2).mean()

    def train(self, controller: adaptlr.AdaptiveLR, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.loss()
            self.optimizer.zero_grad()
            loss.backward()
            controller.step(loss)
            losses.append(loss.item())
        return losses


def controlled(kind: str, typed: float, **arguments: object) -> tuple[Task, adaptlr.AdaptiveLR]:
    task = Task(kind, typed)
    return task, adaptlr.AdaptiveLR(task.optimizer, **{"total_steps": 300, **arguments})


@pytest.mark.parametrize(("kind", "steps"), [("AdamW", 300), ("SGD", 500)])
def test_every_start_ends_at_the_same_peak(kind, steps):
    peaks = []
    for lr in (1e-7, 10.0):
        task, controller = controlled(kind, lr, lr="auto", total_steps=steps)
        before = [p.clone() for p in task.model.parameters()]
        kinds = []
        while "found" not in kinds:
            task.train(controller, 1)
            kinds = [event.kind for event in controller.events()]
        assert kinds == ["search", "found"]
        assert all(map(torch.equal, task.model.parameters(), before))
        losses = task.train(controller, steps - controller.status().step)
        assert np.mean(losses[-20:]) < 0.6
        peaks.append(controller.history()["lr"][60:].max())
        assert controller.history()["lr"][-1] == 0.0
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adagrad"])
def test_a_short_run_takes_the_first_gradients_word_where_ramps_mislead(kind):
    runs = []
    for lr in (1e-7, 10.0):
        task, controller = controlled(kind, lr, lr="auto")
        losses = task.train(controller, 300)
        assert [event.kind for event in controller.events()] == ["found"]
        assert "there was no room for a ramp" in controller.events()[0].reason
        assert np.mean(losses[-20:]) < 0.6
        lrs = controller.history()["lr"]
        # 30 steps of warm-up, the 50 that a search might have taken at the peak, then the decay.
        np.testing.assert_allclose(lrs[:30] / lrs[30], np.arange(1, 31) / 30, rtol=1e-6)
        assert (lrs[29:80] == lrs[30]).all()
        assert lrs[80] < lrs[79]
        assert lrs[-1] == 0.0
        runs.append(lrs)
    np.testing.assert_allclose(*runs, rtol=1e-6)


def test_a_short_run_of_sgd_is_searched_where_its_first_gradient_tells_nothing():
    task, controller = controlled("SGD", 1e-5, lr="auto")
    for scale in (math.inf, 1.0):
        loss = task.loss()
        task.optimizer.zero_grad()
        (loss * scale).backward()
        controller.step(loss)
    assert controller.status().phase is adaptlr.Phase.SEARCH
    task.train(controller, 60)
    assert controller.events()[-1].kind == "found"


@pytest.mark.parametrize("steps", [20, 60, 120])
def test_a_run_whose_search_took_no_step_resumes_as_if_it_had_never_stopped(steps):
    task, controller = controlled("SGD", 1e-5, lr="auto")
    task.train(controller, steps)
    again_task, again = controlled("SGD", 3.0, lr="auto")
    again_task.model.load_state_dict(task.model.state_dict())
    again_task.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict()))
    again_task.random.set_state(task.random.get_state())
    assert again_task.train(again, 30) == task.train(controller, 30)
    assert again.lr == controller.lr


def test_the_event_of_a_search_tells_what_was_seen():
    task, controller = controlled("AdamW", 1e-5, lr="auto")
    task.train(controller, 60)
    found = controller.events()[1]
    assert "on the ramp the loss was lowest" in found.reason
    assert "the first gradient suggests" in found.reason
    assert "apart;" in found.reason
    assert found.factor == 1.0


def test_the_event_of_a_search_tells_that_its_ramp_is_not_believed():
    scenario = Scenario(TOO_HIGH, SEARCHED, SEARCH)
    _, _, (records, _) = run_loop(scenario, STEPS, told(1e-4))
    found = records[records["flags"] & Flag.FOUND != 0]
    reason = make_events(found)[0].reason
    assert "apart, which is more than is believed;" in reason
    assert f"which suggests {found['cusum'][0] / RAMP_DIVISOR:.2g};" in reason


def test_a_checkpoint_in_a_search_ends_it_with_the_best_estimate():
    task, controller = controlled("AdamW", 1e-5, lr="auto")
    task.train(controller, 30)
    assert controller.status().phase is adaptlr.Phase.SEARCH
    saved = task.optimizer.state_dict()
    resumed_task, resumed = controlled("AdamW", 1e-5, lr="auto")
    resumed_task.optimizer.load_state_dict(saved)
    assert "the search that was under way needs snapshots" in resumed.events()[0].reason
    resumed_task.train(resumed, 60)
    assert resumed.status().phase is adaptlr.Phase.RUN
    assert resumed.history()["lr"].max() > 1e-4


def test_resuming_after_a_search_keeps_what_it_found():
    task, controller = controlled("AdamW", 1e-5, lr="auto")
    task.train(controller, 100)
    again_task, again = controlled("AdamW", 3.0, lr="auto")  # says as little as the first did
    again_task.model.load_state_dict(task.model.state_dict())
    again_task.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict()))
    again_task.random.set_state(task.random.get_state())
    assert again_task.train(again, 20) == task.train(controller, 20)


def test_an_unknown_optimizer_is_searched_with_a_coarse_ramp_first():
    task = Task("Adadelta", 1e-3)
    controller = adaptlr.AdaptiveLR(task.optimizer, 1000, lr="auto")
    task.train(controller, 105)
    kinds = [event.kind for event in controller.events()]
    assert kinds[-1] == "found"
    assert kinds.count("search") >= 2


@pytest.mark.parametrize("steps_before", [0, 1])
def test_the_state_that_adagrad_begins_with_is_none_that_it_has_come_by(steps_before):
    task = Task("Adagrad", 1e-3)
    for _ in range(steps_before):
        task.loss().backward()
        task.optimizer.step()
    controller = adaptlr.AdaptiveLR(task.optimizer, 300, lr="auto")
    task.train(controller, 60)
    reason = next(event.reason for event in controller.events() if event.kind == "found")
    assert ("the first gradient suggests" in reason) == (steps_before == 0)


def test_without_snapshots_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="lr must be a float for Adadelta without a ramp"):
        controlled("Adadelta", 1e-3, lr="auto", snapshot="off")


def test_set_peak_takes_the_place_of_what_a_search_has_found():
    task, controller = controlled("AdamW", 1e-7, lr="auto", decay="constant")
    task.train(controller, 100)
    controller.set_peak(2e-3)
    task.train(controller, 1)
    assert controller.status().lr == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("total_steps", "steps"), [(None, 100), (100, 0), (200, 40), (300, 50), (1_000_000, 100)]
)
def test_a_search_costs_a_bounded_share_of_the_run(total_steps, steps):
    assert adaptlr.Search().steps_of(total_steps) == steps


# The check at step one.


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_only_a_rate_more_than_60_times_off_is_warned_of(kind):
    task, controller = controlled(kind, 1e-30)
    with pytest.warns(UserWarning, match="times below what the first gradient suggests"):
        task.train(controller, 1)
    suggested = controller.history()["rise"][0]
    for times in (1 / 59, 1.0, 59.0):
        task, controller = controlled(kind, suggested * times)
        task.train(controller, 3)
        assert controller.events() == []
    for times, side in ((1 / 61, "below"), (61.0, "above")):
        task, controller = controlled(kind, suggested * times)
        with pytest.warns(UserWarning, match=f"61 times {side}.*check_lr=False silences this"):
            task.train(controller, 1)
        assert [event.kind for event in controller.events()] == ["far_lr"]


def test_the_check_changes_nothing():
    runs = []
    for checks in (True, False):
        task, controller = controlled("AdamW", 1e-2, check_lr=checks)
        runs.append([*task.train(controller, 50), *controller.history()["lr"]])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("case", ["off", "worn", "negative", "infinite"])
def test_no_word_where_nothing_is_known(case):
    task = Task("AdamW", 1e-30)
    if case == "worn":
        task.loss().backward()
        task.optimizer.step()
    controller = adaptlr.AdaptiveLR(task.optimizer, 100, check_lr=case != "off")
    loss = task.loss() - (100.0 if case == "negative" else 0.0)
    task.optimizer.zero_grad()
    loss.backward()
    if case == "infinite":
        task.model[0].bias.grad.fill_(math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.step(loss)
    assert not controller.history()["flags"][0] & Flag.FAR_LR


# On a CUDA device.


@pytest.mark.cuda
def test_a_captured_search_runs_without_the_host():
    task = Task("AdamW", 1e-7, "cuda")
    controller = adaptlr.AdaptiveLR(task.optimizer, 300, lr="auto")
    x = task.batch()

    def iterate() -> None:
        task.optimizer.zero_grad()
        loss = task.loss(x)
        loss.backward()
        controller.step(loss)

    graph = capture(controller, iterate)
    for _ in range(300):
        x.copy_(task.batch())
        graph.replay()
    torch.cuda.synchronize()
    assert [event.kind for event in controller.events()][:2] == ["search", "found"]
    assert "the first gradient suggests" in controller.events()[1].reason
    assert 1e-3 < controller.history()["lr"][60:].max() < 0.3


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("device_path", "tolerance"), [("fused", 1.3), ("capturable", 1.3), ("float", 2.5)]
)
def test_every_path_finds_the_peak_that_the_cpu_finds(device_path, tolerance):
    peaks = []
    for device, path in (("cpu", "auto"), ("cuda", device_path)):
        task = Task("AdamW", 10.0, device)
        controller = adaptlr.AdaptiveLR(task.optimizer, 300, lr="auto", device_path=path)
        task.train(controller, 60)
        controller.detach()  # waits for the device
        found = next(event for event in controller.events() if event.kind == "found")
        peaks.append(float(found.reason.rpartition(" ")[2]))
    # Rounding grows along a ramp, and lr as a number is two steps late.
    assert 1 / tolerance < peaks[0] / peaks[1] < tolerance


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_check_at_step_one_waits_for_nothing():
    task = Task("SGD", 1e-12, "cuda")
    controller = adaptlr.AdaptiveLR(task.optimizer, 300, snapshot="off")
    loss = task.loss()
    loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        controller.step(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert [event.kind for event in controller.events()] == ["far_lr"]
    with pytest.warns(UserWarning, match="below what the first gradient suggests"):
        task.train(controller, 1)
