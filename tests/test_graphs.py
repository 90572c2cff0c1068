"""Control inside CUDA graphs: captured whole or in part, replayed as the eager loop would run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import loss_of, parameters_of, same, skips, train
from optimizers import CASES, DEVICE_CONTROLLED, expected_path, make

from adaptlr import AdaptiveLR, Guard, TrainingDiverged

NAN = float("nan")
ON_DEVICE = [case for case in CASES if expected_path(case) in DEVICE_CONTROLLED]


def warm_up(controller, iterate, times=3):
    """Run iterations on a side stream, as a capture demands, without a trace."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), controller.suspended():
        for _ in range(times):
            iterate()
    torch.cuda.current_stream().wait_stream(stream)


def capture(controller, iterate):
    warm_up(controller, iterate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate()
    return graph


class WholeStep:
    """Forward, backward and the controlled step of one model in one graph."""

    def __init__(self, model, optimizer, controller, batch):
        self.batch = batch.clone()
        self.scale = torch.ones((), device=batch.device)

        def iterate():
            optimizer.zero_grad()
            loss = loss_of(model, self.batch) * self.scale
            loss.backward()
            controller.step(loss)

        self.graph = capture(controller, iterate)

    def replay(self, batch, poison=False):
        self.batch.copy_(batch)
        self.scale.fill_(NAN if poison else 1.0)
        self.graph.replay()


# -- suspended ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_suspended_steps_leave_no_trace_on_the_cpu(name, make_model, batches):
    model = make_model()
    controller = AdaptiveLR(getattr(torch.optim, name)(model.parameters()), total_steps=20)
    train(controller, model, batches[:3])
    kept = parameters_of(model)
    with controller.suspended():
        for _ in range(3):
            train(controller, model, batches[:2])
    assert same(parameters_of(model), kept)
    assert controller.status().step == 3
    train(controller, model, batches[:1])
    assert controller.status().step == 4
    assert not same(parameters_of(model), kept)


def test_suspension_ends_with_its_context_also_by_an_error(make_model, batches):
    model = make_model()
    controller = AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=20)
    with pytest.raises(KeyError), controller.suspended():
        raise KeyError
    train(controller, model, batches[:1])
    assert controller.status().step == 1


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_suspended_steps_leave_no_trace_on_the_device(case, make_model, data):
    if case.startswith(("SparseAdam", "LBFGS", "Muon", "ASGD")) or "float" in expected_path(case):
        pytest.skip("the optimizer moves without a gradient, or takes lr late")
    model = make_model(device="cuda")
    controller = AdaptiveLR(make(case, model.parameters()), total_steps=20)
    kept = parameters_of(model)
    with controller.suspended():
        train(controller, model, data[:3])
    assert same(parameters_of(model), kept)
    train(controller, model, data[:5])
    torch.cuda.synchronize()
    assert controller.status().step == 5
    assert skips(controller) == 0
    other = make_model(device="cuda")
    fresh = AdaptiveLR(make(case, other.parameters()), total_steps=20)
    train(fresh, other, data[:5])
    torch.cuda.synchronize()
    assert controller.history()["lr"].tolist() == fresh.history()["lr"].tolist()
    if expected_path(case) == "fused":
        assert same(parameters_of(model), parameters_of(other))


# -- capture and replay ------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("case", ON_DEVICE)
def test_a_captured_training_step_replays_as_the_eager_loop_runs(case, make_model, data):
    steps, poison = 60, (9, 30)
    replayed, bare = make_model(device="cuda"), make_model(device="cuda")
    optimizer = make(case, replayed.parameters())
    controller = AdaptiveLR(optimizer, total_steps=steps)
    step = WholeStep(replayed, optimizer, controller, data[0])
    for index in range(steps):
        step.replay(data[index % len(data)], poison=index in poison)
    torch.cuda.synchronize()
    reference = make(case, bare.parameters())
    reference_controller = AdaptiveLR(reference, total_steps=steps)
    with reference_controller.suspended():  # as in the warm-up: step counts may have gone on
        train(reference_controller, bare, data[:3])
    train(reference_controller, bare, data[:steps], poison)
    torch.cuda.synchronize()
    ours, theirs = controller.history(), reference_controller.history()
    assert len(ours) == steps
    assert skips(controller) == len(poison)
    np.testing.assert_allclose(ours["lr"], theirs["lr"], rtol=1e-12)
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-3)
    for left, right in zip(parameters_of(replayed), parameters_of(bare), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["SGD", "AdamW", "RMSprop"])
def test_a_graph_of_the_optimizer_step_alone_takes_losses_that_were_observed_outside(
    case, make_model, data
):
    captured, bare = make_model(device="cuda"), make_model(device="cuda")
    optimizer = make(case, captured.parameters())
    controller = AdaptiveLR(optimizer, total_steps=40)
    loss_of(captured, data[0]).backward()  # makes the gradients that the graph reads
    controller.observe(reduction="sum")  # part of what is captured
    graph = capture(controller, optimizer.step)
    with pytest.raises(ValueError, match="reduction must be the one that was captured"):
        controller.observe(reduction="mean")
    for index in range(40):
        controller.zero_grad(set_to_none=False)
        for half in data[index % len(data)].chunk(2):
            loss = loss_of(captured, half) / 2
            loss.backward()
            controller.observe(loss, reduction="sum")
        graph.replay()
    torch.cuda.synchronize()
    reference = AdaptiveLR(make(case, bare.parameters()), total_steps=40)
    for index in range(40):
        for half in data[index % len(data)].chunk(2):
            loss = loss_of(bare, half) / 2
            loss.backward()
            reference.observe(loss, reduction="sum")
        reference.step()
        reference.zero_grad()
    torch.cuda.synchronize()
    ours, theirs = controller.history(), reference.history()
    assert ours["lr"].tolist() == theirs["lr"].tolist()
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


RUNAWAY = 6000  # the step at which the recorded loss runs away, so that the factor moves


def recorded_losses(steps):
    rng = np.random.default_rng(0)
    time = np.arange(steps)
    losses = 2.0 * np.exp(-time / 3000) + 1.0 + 0.05 * rng.standard_normal(steps)
    losses[RUNAWAY : RUNAWAY + 30] += 0.3 * 1.3 ** np.arange(30)
    losses[1234] = NAN
    return losses.astype(np.float32)


@pytest.mark.cuda
def test_ten_thousand_replays_give_the_rates_of_the_eager_path_bit_for_bit():
    steps = 10_000
    losses = recorded_losses(steps)

    def controlled(device):
        parameter = torch.nn.Parameter(torch.zeros(1, device=device))
        parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        return optimizer, AdaptiveLR(optimizer, total_steps=steps)

    series = torch.from_numpy(losses).cuda()
    optimizer, replayed = controlled("cuda")
    loss, position = torch.zeros((), device="cuda"), torch.zeros((), dtype=torch.int64).cuda()
    lrs = torch.zeros(steps, device="cuda")

    def iterate():
        loss.copy_(series.index_select(0, position.view(1)).view(()))
        replayed.step(loss)
        lrs.index_copy_(0, position.view(1), optimizer.param_groups[0]["lr"].view(1))

    graph = capture(replayed, iterate)
    for _ in range(steps):
        graph.replay()
        position.add_(1)
    eager_optimizer, stepped = controlled("cuda")
    eager_lrs = []
    for value in series:
        stepped.step(value)
        eager_lrs.append(eager_optimizer.param_groups[0]["lr"].clone())
    torch.cuda.synchronize()
    assert torch.equal(lrs, torch.stack(eager_lrs))
    assert replayed.history()["lr"].tobytes() == stepped.history()["lr"].tobytes()
    assert skips(replayed) == skips(stepped) >= 2
    assert min(replayed.history()["factor"]) < 1.0
    _, host = controlled("cpu")
    for value in losses:
        host.step(torch.tensor(value))
    np.testing.assert_allclose(lrs.cpu(), host.history()["lr"], rtol=1.2e-7)


@pytest.mark.cuda
def test_peaks_and_length_can_change_between_replays(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10, warmup=0, decay="linear", guard=None)
    step = WholeStep(model, optimizer, controller, data[0])
    step.replay(data[0])
    controller.set_peak(0.2)
    step.replay(data[1])
    controller.extend(20)
    step.replay(data[2])
    torch.cuda.synchronize()
    assert controller.history()["lr"].tolist() == pytest.approx([0.09, 0.16, 0.17])


@pytest.mark.cuda
def test_a_spent_budget_skips_every_further_replay_and_check_tells(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard = Guard(max_consecutive_skips=2)
    controller = AdaptiveLR(optimizer, total_steps=50, guard=guard, snapshot="off")
    step = WholeStep(model, optimizer, controller, data[0])
    step.replay(data[0])
    torch.cuda.synchronize()
    controller.check()
    kept = parameters_of(model)
    for _ in range(5):
        step.replay(data[1], poison=True)
    step.replay(data[2])
    torch.cuda.synchronize()
    assert same(parameters_of(model), kept)
    with pytest.raises(TrainingDiverged, match="the guard has ended the run"):
        controller.check()


@pytest.mark.cuda
def test_an_optimizer_that_takes_numbers_is_refused_in_a_capture(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10)
    train(controller, model, data[:1])
    loss = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    message = "Adagrad takes lr as a number, which a CUDA graph would freeze"
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        loss.add_(1)
        with pytest.raises(RuntimeError, match=message):
            controller.step(loss)


# -- a graphed or compiled model with an eager step ---------------------------------------------


def accumulate(model, controller, parameters, data, steps, begin=lambda: None):
    """Four micro-batches a step; the loss lies where the model has put it."""
    for parameter in parameters:  # a graph's own gradients would be overwritten by the next
        parameter.grad = torch.zeros_like(parameter)
    means = []
    for step in range(steps):
        losses = []
        for batch in data[step % 8].chunk(4):
            begin()
            loss = model(batch)
            losses.append(loss.detach().clone())
            (loss / 4).backward()
            controller.observe(loss)
        means.append(torch.stack(losses).mean())
        controller.step()
        controller.zero_grad(set_to_none=False)
    torch.cuda.synchronize()
    return [float(mean) for mean in means]


class Loss(torch.nn.Module):
    """A model whose output is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return loss_of(self.model, batch)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_losses_of_a_graphed_model_are_averaged_from_the_first_step_on(make_model, data):
    model = Loss(make_model(device="cuda"))
    graphed = torch.cuda.make_graphed_callables(model, (data[0].chunk(4)[0].clone(),))
    controller = AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.01), total_steps=20)
    means = accumulate(graphed, controller, model.parameters(), data, 8)
    assert controller.history()["loss"].tolist() == pytest.approx(means, rel=1e-6)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_losses_of_a_compiled_model_are_averaged_from_the_first_step_on(make_model, data):
    model = Loss(make_model(device="cuda"))
    compiled = torch.compile(model, mode="reduce-overhead")
    controller = AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.01), total_steps=20)
    begin = torch.compiler.cudagraph_mark_step_begin
    means = accumulate(compiled, controller, model.parameters(), data, 8, begin)
    assert controller.history()["loss"].tolist() == pytest.approx(means, rel=1e-6)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_one_loss_a_step_costs_two_launches_from_the_second_step_on(make_model, data):
    model = make_model(device="cuda")
    controller = AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.01), total_steps=20)
    train(controller, model, data[:2])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        train(controller, model, data[:3])
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.name.startswith("adaptlr")]
    assert names == ["adaptlr_control_step", "adaptlr_snapshot"] * 3
