"""Snapshots on a CUDA device: one kernel fills slots and puts them back, also inside a graph."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import loss_of, parameters_of, same, train
from test_cuda import Device, stream
from test_graphs import WholeStep
from test_snapshot import FIRST, SECOND, START, addresses, equal, frozen, split
from test_update import config_of, to_structured
from traces import TRACES

from adaptlr import AdaptiveLR, Phase, _extension
from adaptlr.device_slots import DeviceSlots

pytestmark = pytest.mark.cuda
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),  # capturable
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),  # late float, as the next one
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, foreach=False),
}
GRAPHED = ("SGD", "AdamW", "RMSprop", "NAdam")
PLACES = ("device", "host")


def words_of(controller) -> torch.Tensor:
    """Return what the control kernel orders: save and restore, two int32."""
    block = controller._path._block
    return block[_extension.SAVE_OFFSET : _extension.RESTORE_OFFSET + 4].view(torch.int32)


class Orders:
    """Replaces what the control step orders by what a test does."""

    def __init__(self, controller) -> None:
        self._words = words_of(controller)
        self._coming = torch.zeros(2, dtype=torch.int32, device="cuda")
        controller._optimizer.register_step_pre_hook(lambda *_: self._replace())

    def _replace(self) -> None:
        self._words.copy_(self._coming)
        self._coming.zero_()

    def give(self, save: int = 0, restore: int = 0) -> None:
        self._coming.copy_(torch.tensor([save, restore], dtype=torch.int32))


def on_device(state: object) -> object:
    """Drop what lies on the host: its restores need the record."""
    if isinstance(state, dict):
        return {key: on_device(value) for key, value in state.items() if key != "step"}
    return state


def device_state(optimizer) -> object:
    return on_device(frozen(optimizer))


def made(make_model, name, **options):
    model = make_model(device="cuda")
    optimizer = OPTIMIZERS[name](model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=200, **options)
    return model, optimizer, controller, Orders(controller)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_orders_are_carried_out_after_the_update(name, place, make_model, data):
    model, optimizer, controller, orders = made(make_model, name, snapshot=place)
    start = parameters_of(model)
    train(controller, model, data[:5])
    where = addresses(optimizer)
    orders.give(save=FIRST)
    train(controller, model, data[5:6])
    first = device_state(optimizer)
    train(controller, model, data[6:10])
    assert not equal(device_state(optimizer), first)
    orders.give(restore=FIRST)
    train(controller, model, data[10:11])
    assert equal(device_state(optimizer), first)
    orders.give(save=SECOND, restore=START)
    train(controller, model, data[11:12])
    assert same(parameters_of(model), start)
    train(controller, model, data[12:14])
    orders.give(restore=SECOND)
    train(controller, model, data[14:15])
    assert not same(parameters_of(model), start)
    assert not equal(device_state(optimizer), first)
    assert addresses(optimizer) == where


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", GRAPHED)
def test_a_captured_graph_takes_orders(name, place, make_model, data):
    model, optimizer, controller, orders = made(make_model, name, snapshot=place)
    start = parameters_of(model)
    step = WholeStep(model, optimizer, controller, data[0])
    for index, batch in enumerate(data[:10]):
        if index == 4:
            orders.give(save=FIRST)
        step.replay(batch)
        if index == 4:
            kept = frozen(optimizer)
    assert not equal(frozen(optimizer), kept)
    orders.give(restore=FIRST)
    step.replay(data[10])
    assert equal(frozen(optimizer), kept)
    orders.give(restore=START)
    step.replay(data[11])
    assert same(parameters_of(model), start)


def test_state_that_appears_after_the_capture_is_covered_by_its_replays(make_model, data):
    model, optimizer, controller, orders = made(make_model, "AdamW")
    step = WholeStep(model, optimizer, controller, data[0])
    table = controller._path.table
    optimizer.load_state_dict(optimizer.state_dict())  # new tensors; the graph holds the old ones
    assert controller._path.table == table
    orders.give(restore=START)
    start = parameters_of(model)
    step.replay(data[0])
    assert same(parameters_of(model), start)


def test_a_capture_without_warm_up_goes_without_snapshots(make_model, data):
    model, _, controller, _ = made(make_model, "SGD")
    loss = torch.ones((), device="cuda")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.cuda.synchronize()
    with (
        pytest.warns(UserWarning, match="the first step is captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        controller.step(loss)
    assert controller._attachment.snapshots.slots == 0


def test_a_step_that_is_not_ours_repeats_no_order(make_model, data):
    model, optimizer, controller, orders = made(make_model, "SGD")
    train(controller, model, data[:3])
    orders.give(restore=START)
    train(controller, model, data[3:4])
    words_of(controller).copy_(torch.tensor([0, START], dtype=torch.int32))
    before = parameters_of(model)
    loss_of(model, data[4]).backward()
    orders.give(restore=START)
    optimizer.step()
    assert not same(parameters_of(model), before)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "NAdam", "AdamW float"])
def test_a_cut_without_snapshots_zeroes_the_first_moment_on_the_device(name, make_model, data):
    model = make_model(device="cuda")
    optimizer = OPTIMIZERS[name.split()[0]](model.parameters())
    form = "float" if "float" in name else "auto"
    controller = AdaptiveLR(optimizer, 200, snapshot="off", warmup=0, device_path=form)
    moments, rest, weights = [], None, []
    for index in range(90):
        loss_of(model, data[index % len(data)]).backward()
        moments, rest = split(optimizer)
        weights = parameters_of(model)
        level = 1.0 + 0.01 * (index % 7) + 0.2 * max(0, index - 70)
        controller.step(torch.tensor(level, device="cuda"))
        controller.zero_grad()
        torch.cuda.synchronize()
        if controller.status().phase is Phase.REWARM:
            break
    assert controller.status().phase is Phase.REWARM
    assert all(moment.any() for moment in moments)
    zeroed, same_rest = split(optimizer)
    assert not any(moment.any() for moment in zeroed)
    if form != "float":  # there AdamW's weight decay acts once more, with the rate before the cut
        assert same(parameters_of(model), weights)
    if name in ("SGD", "AdamW"):  # fused: the step has left no trace
        assert equal(same_rest, rest)
    assert "momentum zeroed" in controller.events()[-1].reason
    train(controller, model, data[:1])
    assert all(moment.any() for moment in split(optimizer)[0])


@pytest.mark.parametrize("name", GRAPHED)
def test_a_captured_cut_zeroes_the_first_moment(name, make_model, data):
    model = make_model(device="cuda")
    optimizer = OPTIMIZERS[name](model.parameters())
    controller = AdaptiveLR(optimizer, 200, snapshot="off", warmup=0)
    step = WholeStep(model, optimizer, controller, data[0])
    step.scale.fill_(1.0)
    for index in range(90):
        step.batch.copy_(data[index % len(data)])
        step.scale.mul_(1.5 if index > 70 else 1.0)
        step.graph.replay()
        torch.cuda.synchronize()
        if controller.status().phase is Phase.REWARM:
            break
    assert controller.status().phase is Phase.REWARM
    assert not any(moment.any() for moment in split(optimizer)[0])


def through_a_file(value: object):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_can_bring_the_slots_back(name, place, make_model, data):
    options = {"snapshot": place, "save_snapshots": True}
    model, optimizer, controller, orders = made(make_model, name, **options)
    start = parameters_of(model)
    train(controller, model, data[:5])
    orders.give(save=FIRST)
    train(controller, model, data[5:6])
    first = device_state(optimizer)
    train(controller, model, data[6:8])
    state = controller._path.state()
    state["good_slot"] = FIRST
    controller._path.configure(state)
    saved = through_a_file((model.state_dict(), optimizer.state_dict()))
    other, its_optimizer, resumed, its_orders = made(make_model, name, **options)
    its_optimizer.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    again = through_a_file(resumed.state_dict(snapshots=True))
    assert equal(again["adaptlr_snapshots"], saved[1]["param_groups"][0]["adaptlr_snapshots"])
    its_orders.give(restore=FIRST)
    train(resumed, other, data[8:9])
    assert equal(device_state(its_optimizer), first)
    train(resumed, other, data[9:10])
    its_orders.give(restore=START)
    train(resumed, other, data[10:11])
    assert same(parameters_of(other), start)


def test_slots_of_a_checkpoint_are_there_for_replays(make_model, data):
    model, optimizer, controller, _ = made(make_model, "AdamW", save_snapshots=True)
    start = parameters_of(model)
    train(controller, model, data[:4])
    saved = through_a_file((model.state_dict(), optimizer.state_dict()))
    other, its_optimizer, resumed, its_orders = made(make_model, "AdamW")
    graphed = WholeStep(other, its_optimizer, resumed, data[0])
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1]["param_groups"][0])
    assert not same(parameters_of(other), start)
    its_orders.give(restore=START)
    graphed.replay(data[4])
    assert same(parameters_of(other), start)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("place", PLACES)
def test_neither_making_slots_nor_orders_wait_for_the_device(place, make_model, data):
    model, _, controller, orders = made(make_model, "AdamW", snapshot=place)
    words = torch.tensor([FIRST, 0], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data[:6]:
            orders._coming.copy_(words)
            train(controller, model, [batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert controller._attachment.snapshots.slots == 3


def test_an_expanded_parameter_is_refused(make_model):
    parameter = torch.nn.Parameter(torch.zeros(1, device="cuda").expand(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1, foreach=False)
    controller = AdaptiveLR(optimizer, total_steps=10, snapshot="device")
    with pytest.raises(ValueError, match="must fill a stretch of memory, got shape"):
        controller.step(torch.ones((), device="cuda"))


# -- the kernel by itself ----------------------------------------------------------------------


def tensors() -> list[torch.Tensor]:
    """Return tensors of every alignment, size and layout, each a part of something larger."""
    parts = []
    for offset, size in enumerate((1, 3, 15, 16, 17, 1000, 65_536, 65_537, 200_003, 1 << 20)):
        whole = torch.randint(256, (size + 64,), dtype=torch.uint8, device="cuda")
        parts.append(whole[16 + offset : 16 + offset + size])
    parts.append(torch.randn(33, dtype=torch.bfloat16, device="cuda")[1:])
    parts.append(torch.randn(5, 7, device="cuda").t())
    parts.append(torch.randn(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last))
    return parts


def wholes(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copy the storages, the surroundings of each part with them."""
    bytes_of = [
        torch.empty(0, dtype=torch.uint8, device="cuda").set_(p.untyped_storage()) for p in parts
    ]
    return [whole.clone() for whole in bytes_of]


class Slots:
    """A table and its kernel, driven by hand."""

    def __init__(self, place: str, parts: list[torch.Tensor], slots: int = 3) -> None:
        row, _ = to_structured(config_of(TRACES[0], 0))
        self.device = Device(row, 16)
        self.slots = DeviceSlots(self.device.core, torch.device("cuda", 0))
        self.slots.lay_out(slots, place)
        self.slots.cover(parts)

    def run(self, save: int = 0, restore: int = 0) -> None:
        first = _extension.SAVE_OFFSET
        words = self.device.block[first : first + 8].view(torch.int32)
        words.copy_(torch.tensor([save, restore], dtype=torch.int32))
        self.device.core.snapshot(stream(), self.slots.table)


def scramble(parts: list[torch.Tensor]) -> None:
    for part in parts:
        part.copy_(torch.randint(100, part.shape, device="cuda"))


@pytest.mark.parametrize("place", PLACES)
def test_every_alignment_and_layout_is_copied_and_nothing_beside_it(place):
    parts = tensors()
    slots = Slots(place, parts)
    states = [wholes(parts)]
    for slot in (FIRST, SECOND):
        scramble(parts)
        states.append(wholes(parts))
        slots.run(save=slot)
        assert same(wholes(parts), states[-1])
    scramble(parts)
    for slot in (START, SECOND, FIRST):
        slots.run(restore=slot)
        assert same(wholes(parts), states[slot - 1])


@pytest.mark.parametrize("place", PLACES)
def test_saving_and_restoring_in_one_step_exchanges(place):
    parts = tensors()
    slots = Slots(place, parts)
    start = wholes(parts)
    scramble(parts)
    current = wholes(parts)
    slots.run(save=FIRST, restore=START)
    assert same(wholes(parts), start)
    slots.run(restore=FIRST)
    assert same(wholes(parts), current)


def test_without_an_order_and_without_the_slot_nothing_moves():
    parts = tensors()
    slots = Slots("device", parts, slots=1)
    scramble(parts)
    current = wholes(parts)
    slots.run()
    slots.run(save=FIRST)  # only START was laid out
    slots.run(restore=FIRST)
    assert same(wholes(parts), current)
    slots.run(restore=START)
    assert not same(wholes(parts), current)


def test_slots_are_freed():
    parts = [torch.zeros(1 << 24, device="cuda")]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    slots = Slots("device", parts)
    assert torch.cuda.memory_allocated() - before >= 3 << 26
    assert slots.slots.bytes >= 3 << 26
    slots.slots.forget()
    assert torch.cuda.memory_allocated() - before < 1 << 20
    slots.run(save=START)  # an empty table
    torch.cuda.synchronize()
