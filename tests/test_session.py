"""Sessions: late errors name the line that caused them, nothing waits that need not, nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from at_once import at_once

import housecall as hc
from housecall.pointers.live import Live
from housecall.pointers.session import Session
from housecall.pointers.slot import Slot
from housecall.program.call import Call
from housecall.transport.memory import MemoryTransport
from housecall.types import Ref
from housecall.wire.messages import Describe, Drop, Fetch, Frame, Message, Put, Reply, Run

HERE = Path(__file__)
FRAME = MemoryTransport.frame_messages


class Counting:
    """A transport that remembers what went through it."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.frame_messages = transport.frame_messages
        self.frame_bytes = transport.frame_bytes
        self.remote = transport.remote
        self.frames: list[Frame] = []
        self.received = 0

    @property
    def messages(self) -> list[Message]:
        return [message for frame in self.frames for message in frame.messages]

    def kinds(self) -> list[type]:
        return [type(message) for message in self.messages]

    def send(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.transport.send(frame)

    def start(self) -> None:
        self.transport.start()

    def wait(self) -> None:
        self.transport.wait()

    def receive(self) -> Reply:
        self.received += 1
        return self.transport.receive()

    def close(self) -> None:
        self.transport.close()


def counted(worker: hc.VirtualWorker) -> Counting:
    worker.session.wait()
    counting = Counting(worker.session.transport)
    worker.session.transport = counting
    return counting


def broken(worker: hc.VirtualWorker) -> hc.PointerTensor:
    x = torch.arange(6.0).view(3, 2).send(worker)
    return x.index_select(0, torch.tensor([7]).send(worker))  # the line that is to blame


def line_of(text: str) -> int:
    """The number of the one line of this file that ends in this comment."""
    (found,) = [n for n, line in enumerate(HERE.read_text().splitlines(), 1) if line.endswith("# " + text)]
    return found


def assert_blames(error: hc.OperatorError) -> None:
    assert error.worker == "clinic"
    assert error.operator == "index_select.default"
    assert "index out of range" in error.reason
    source = "return x.index_select(0, torch.tensor([7]).send(worker))  # the line that is to blame"
    assert error.site == f"{__file__}:{line_of('the line that is to blame')} in broken: {source}"
    text = str(error)
    assert text.startswith("index_select.default failed at worker 'clinic': IndexError: index out of range")
    assert text.endswith(f"\n  issued at {error.site}")


# -- late errors ------------------------------------------------------------------------------------------


def test_a_late_error_names_worker_operator_and_line(clinic: hc.VirtualWorker) -> None:
    result = broken(clinic)
    with pytest.raises(hc.OperatorError) as caught:
        result.get()
    assert_blames(caught.value)


@pytest.mark.parametrize("how", ["get", "item", "copy", "tolist", "bool", "move"])
def test_every_way_to_read_says_it(how: str, clinic: hc.VirtualWorker) -> None:
    result = broken(clinic).sum()
    ways = {
        "get": lambda: result.get(),
        "item": lambda: result.item(),
        "copy": lambda: result.copy().get(),
        "tolist": lambda: result.tolist(),
        "bool": lambda: bool(result),
        "move": lambda: result.move(hc.VirtualWorker(id="school")),
    }
    with pytest.raises(hc.OperatorError) as caught:
        ways[how]()
    assert_blames(caught.value)


def test_what_was_computed_from_a_failure_gives_the_first_cause(clinic: hc.VirtualWorker) -> None:
    result = broken(clinic)
    once = result + 1
    twice = torch.relu(once @ once.t())
    for pointer in (twice, once, result, twice):
        with pytest.raises(hc.OperatorError) as caught:
            pointer.copy().get()
        assert_blames(caught.value)


def test_the_cause_is_known_frames_later(clinic: hc.VirtualWorker) -> None:
    result = broken(clinic)
    clinic.session.wait()
    later = torch.ones(1).send(clinic)
    for _ in range(3 * FRAME):
        later = later + 1
    clinic.session.wait()
    later = result.sum() + later
    with pytest.raises(hc.OperatorError) as caught:
        later.get()
    assert_blames(caught.value)


def test_a_shape_that_only_the_worker_knows_fails_late_too(clinic: hc.VirtualWorker) -> None:
    result = broken(clinic)
    with pytest.raises(hc.OperatorError) as caught:
        result.nonzero()
    assert_blames(caught.value)


def test_through_autograd_the_line_is_the_callers(clinic: hc.VirtualWorker) -> None:
    weight = torch.ones(3, 2).send(clinic).requires_grad_()
    rows = torch.tensor([0, 5]).send(clinic)
    loss = torch.nn.functional.embedding(rows, weight).sum()  # a lookup past the end
    loss.backward()
    for pointer in (loss, weight.grad):  # the gradient as well comes of what failed
        with pytest.raises(hc.OperatorError) as caught:
            pointer.get()
        assert f"{__file__}:{line_of('a lookup past the end')} in test_through_autograd" in caught.value.site


def test_what_fails_in_the_backward_names_the_line_of_the_backward(clinic: hc.VirtualWorker) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            chosen = grad.index_select(0, torch.tensor([9]).send(clinic))  # wrong in the backward
            return grad * chosen

    x = torch.ones(3).send(clinic).requires_grad_()
    Wrong.apply(x).sum().backward()
    with pytest.raises(hc.OperatorError) as caught:
        x.grad.get()
    assert f"{__file__}:{line_of('wrong in the backward')} in backward" in caught.value.site


def test_an_in_place_call_that_fails_is_raised_at_the_next_wait(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(3, 2).send(clinic)
    other = torch.zeros(1).send(clinic)
    x.index_fill_(0, torch.tensor([9]).send(clinic), 5.0)  # writes past the end
    with pytest.raises(hc.OperatorError) as caught:
        other.copy().get()  # nobody reads x
    assert caught.value.operator == "index_fill_.int_Scalar"
    assert f"{__file__}:{line_of('writes past the end')} in test_an_in_place" in caught.value.site
    assert torch.equal(x.get(), torch.ones(3, 2))  # it was said once; the value is as it was
    assert torch.equal(other.get(), torch.zeros(1))


def test_an_in_place_call_that_fails_halfway_is_raised(clinic: hc.VirtualWorker) -> None:
    """torch writes the rows before the bad index; what it wrote stays written, and the error says so in time."""
    x = torch.ones(3, 2).send(clinic)
    x.index_fill_(0, torch.tensor([0, 9]).send(clinic), 5.0)
    with pytest.raises(hc.OperatorError, match="index_fill_"):
        clinic.session.wait()
    assert torch.equal(x.get()[1:], torch.ones(2, 2))


def test_writing_a_failure_into_a_value_is_raised_and_leaves_it(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(1, 2).send(clinic)
    x.add_(broken(clinic))
    with pytest.raises(hc.OperatorError) as caught:
        clinic.session.wait()
    assert_blames(caught.value)
    assert torch.equal(x.get(), torch.ones(1, 2))


def test_after_an_error_the_session_goes_on(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(3).send(clinic)
    for round_ in range(3):
        with pytest.raises(hc.OperatorError):
            broken(clinic).get()
        assert torch.equal((x + round_).get(), torch.ones(3) + round_)
    assert not clinic.session.busy
    del x
    gc.collect()
    assert clinic._objects == {}


def test_a_failure_that_nobody_reads_is_no_error(clinic: hc.VirtualWorker) -> None:
    broken(clinic)
    clinic.session.wait()
    assert clinic._objects == {}


@pytest.mark.parametrize("codec", [False, True])
def test_a_synchronous_session_raises_at_the_line_itself(codec: bool) -> None:
    worker = hc.VirtualWorker(id="clinic", synchronous=True, codec=codec)
    x = torch.ones(3, 2).send(worker)
    wrong = torch.tensor([9]).send(worker)
    with pytest.raises(hc.OperatorError, match="index_fill_"):
        x.index_fill_(0, wrong, 5.0)
    assert torch.equal(x.copy().get(), torch.ones(3, 2))


def test_a_synchronous_session_raises_at_the_line_of_a_result_that_fails() -> None:
    worker = hc.VirtualWorker(id="clinic", synchronous=True)
    with pytest.raises(hc.OperatorError):
        broken(worker)


def test_synchronous_can_be_switched(clinic: hc.VirtualWorker) -> None:
    assert not clinic.synchronous
    x = torch.ones(3).send(clinic)
    before = clinic.session.waits
    clinic.synchronous = True
    y = x + 1
    assert clinic.session.waits == before + 1
    clinic.synchronous = False
    y = y + 1
    assert clinic.session.waits == before + 1
    assert torch.equal(y.get(), torch.full((3,), 3.0))


# -- waiting ----------------------------------------------------------------------------------------------


def test_ten_operations_and_a_get_wait_once(clinic: hc.VirtualWorker) -> None:
    counting = counted(clinic)
    before = clinic.session.waits
    x = torch.ones(3).send(clinic)
    for _ in range(10):
        x = x + 1
    assert clinic.session.waits == before
    assert counting.frames == []
    assert torch.equal(x.get(), torch.full((3,), 11.0))
    assert clinic.session.waits == before + 1
    assert len(counting.frames) == counting.received == 1
    assert counting.kinds().count(Call) == 10
    assert counting.kinds().count(Fetch) == 1


def test_a_long_run_leaves_in_frames_and_still_waits_once(clinic: hc.VirtualWorker) -> None:
    counting = counted(clinic)
    before = clinic.session.waits
    x = torch.zeros(3).send(clinic)
    for _ in range(4 * FRAME):
        x = x + 1
    assert clinic.session.waits == before
    assert 4 <= len(counting.frames) <= 9  # each call comes with the drop of the value before it
    assert x.get()[0] == 4 * FRAME
    assert clinic.session.waits == before + 1
    assert [frame.number for frame in counting.frames] == sorted({frame.number for frame in counting.frames})
    assert counting.kinds().count(Call) == 2 * FRAME  # and then they are known
    assert counting.kinds().count(Run) == 2


def test_a_shape_that_only_the_worker_knows_costs_one_wait(clinic: hc.VirtualWorker) -> None:
    x = torch.tensor([0.0, 1.0, 2.0]).send(clinic)
    counting = counted(clinic)
    before = clinic.session.waits
    found = x.nonzero()
    assert clinic.session.waits == before + 1
    assert counting.kinds() == [Call, Describe]
    assert found.shape == (2, 1)


def test_what_needs_no_value_waits_for_none(clinic: hc.VirtualWorker) -> None:
    before = clinic.session.waits
    x = torch.randn(4, 3).send(clinic).requires_grad_()
    y = x.detach().view(3, 4).t()[1:]
    loss = (x * 2).sum() + y.sum()
    loss.backward()
    assert (y.shape, y.dtype, y.stride(), y.dim(), len(y)) == ((3, 3), torch.float32, (1, 4), 2, 3)
    assert x.grad.shape == (4, 3)
    assert repr(loss)
    assert clinic.session.waits == before


def test_sharing_a_slot_sends_nothing(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(3).send(clinic)
    counting = counted(clinic)
    twin = x.detach()
    assert twin.id_at_location == x.id_at_location
    clinic.session.wait()
    assert counting.frames == []


def test_busy_says_whether_there_is_work(clinic: hc.VirtualWorker) -> None:
    clinic.session.wait()
    assert not clinic.session.busy
    x = torch.ones(3).send(clinic)
    assert not clinic.session.busy  # nothing has used it: it does not leave yet
    y = x + 1
    assert clinic.session.busy
    clinic.session.flush()
    assert clinic.session.busy  # under way
    clinic.session.wait()
    assert not clinic.session.busy
    del x, y
    assert not clinic.session.busy  # dropping is no work
    assert clinic._objects == {}


def test_waiting_for_one_worker_lets_the_other_run(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    x, y = torch.ones(3).send(west), torch.ones(3).send(grape)
    y = y + 1
    assert grape.session.busy
    started: list[bool] = []
    counting = counted(grape)
    y = y + 1
    counting.start = lambda: started.append(True)  # type: ignore[method-assign]
    x.get()
    assert started == [True]
    assert len(counting.frames) == 1  # it was flushed as well
    assert y.get()[0] == 3


# -- what is left behind ----------------------------------------------------------------------------------


def test_a_dropped_pointer_frees_its_slot(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(3).send(clinic)
    y = x + 1
    assert set(clinic._objects) == {x.id_at_location, y.id_at_location}
    twin = x.detach()
    del x
    assert set(clinic._objects) == {twin.id_at_location, y.id_at_location}
    del twin, y
    assert clinic._objects == {}


def test_thousands_are_freed(clinic: hc.VirtualWorker) -> None:
    x = torch.zeros(1).send(clinic)
    kept = [x + n for n in range(3000)]
    assert len(clinic._objects) == 3001
    assert [p.item() for p in kept[::1000]] == [0.0, 1000.0, 2000.0]
    del kept
    gc.collect()
    assert set(clinic._objects) == {x.id_at_location}


def test_a_loop_keeps_no_slots(clinic: hc.VirtualWorker) -> None:
    x = torch.zeros(1).send(clinic)
    held = []
    for _ in range(5):
        for _ in range(2 * FRAME):
            x = x * 1.0 + 1
        held.append(len(clinic._objects))
    assert held == [1] * 5
    assert x.get()[0] == 10 * FRAME


def test_another_thread_may_let_go(clinic: hc.VirtualWorker) -> None:
    box = [torch.ones(3).send(clinic)]
    assert len(clinic._objects) == 1
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert clinic._objects == {}


def test_cycles_are_freed_by_the_collector(clinic: hc.VirtualWorker) -> None:
    class Holder:
        pass

    gc.disable()
    try:
        one, other = Holder(), Holder()
        one.other, other.one = other, one
        one.pointer = torch.ones(3).send(clinic)
        gone = weakref.ref(one)
        del one, other
        assert len(clinic._objects) == 1
        gc.collect()
        assert gone() is None
        assert clinic._objects == {}
    finally:
        gc.enable()


def test_a_graph_is_freed_with_its_loss(clinic: hc.VirtualWorker) -> None:
    weight = torch.ones(4, 4).send(clinic).requires_grad_()
    loss = (torch.ones(2, 4).send(clinic) @ weight).tanh().sum()
    loss.backward()
    held = {weight.id_at_location, weight.grad.id_at_location}
    loss.get()
    del loss
    gc.collect()
    assert set(clinic._objects) == held
    weight.grad = None
    del weight
    gc.collect()
    assert clinic._objects == {}


def test_get_takes_the_value_away(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(3).send(clinic)
    x.get()
    assert clinic._objects == {}
    with pytest.raises(hc.SpentPointerError, match=r"\.get\(\) took its value away from 'clinic'"):
        x + 1


def test_a_drop_comes_after_every_call_that_uses_the_value(clinic: hc.VirtualWorker) -> None:
    counting = counted(clinic)
    x = torch.ones(3).send(clinic)
    ref = x.id_at_location
    y = x + 1
    z = x * 2
    del x
    (y + z).get()
    messages = counting.messages
    drop = messages.index(Drop((ref,)))
    uses = [
        n for n, m in enumerate(messages) if isinstance(m, Call) and any(getattr(a, "id", 0) == ref for a in m.args)
    ]
    assert len(uses) == 2
    assert max(uses) < drop
    assert counting.kinds().index(Put) < min(uses)


def test_what_is_dropped_before_use_never_travels(clinic: hc.VirtualWorker) -> None:
    kept = torch.ones(3).send(clinic)
    counting = counted(clinic)
    sent = clinic.session.bytes_sent
    for _ in range(10):
        torch.randn(1000).send(clinic)
    used = torch.ones(5).send(clinic)
    total = used.sum()
    assert total.get() == 5
    assert torch.equal(kept.get(), torch.ones(3))
    puts = [message for message in counting.messages if isinstance(message, Put)]
    assert [put.id for put in puts] == [used.id_at_location]
    assert clinic.session.bytes_sent - sent == 20


def test_what_is_used_and_then_dropped_travels(clinic: hc.VirtualWorker) -> None:
    counting = counted(clinic)
    x = torch.full((3,), 2.0).send(clinic)
    stacked = torch.stack([x, x])  # within a list
    del x
    y = torch.full((3,), 3.0).send(clinic)
    added = stacked.add(1, alpha=2)
    added.mul_(y)  # as an argument of a write
    del y
    assert torch.equal(added.get(), torch.full((2, 3), 12.0))
    assert counting.kinds().count(Put) == 2


def test_a_closed_worker_says_so(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(3).send(clinic)
    clinic.session.wait()
    clinic.session.close()
    clinic.session.close()
    with pytest.raises(hc.WorkerGone, match="worker 'clinic' is closed"):
        (x + 1).get()
    Session.live.discard(clinic.session)  # see the next test


def test_a_closed_worker_is_no_concern_of_another(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    x, y = torch.ones(3).send(west), torch.ones(3).send(grape)
    west.session.wait()
    west.session.close()
    z = x + 1
    try:
        assert torch.equal(y.get(), torch.ones(3))
    finally:
        Session.live.discard(west.session)
        del z


# -- places -----------------------------------------------------------------------------------------------


def test_ids_of_workers_are_never_shared() -> None:
    seen: set[int] = set()
    for number in range(20):
        worker = hc.VirtualWorker(id=f"w{number}")
        pointers = [torch.ones(1).send(worker) + 1 for _ in range(20)]
        ids = set(worker._objects)
        assert {p.id_at_location for p in pointers} <= ids
        assert not ids & seen
        seen |= ids
    assert len(seen) == 400


def test_reseeding_makes_no_ids_collide() -> None:

    ids = []
    for _ in range(2):
        random.seed(0)
        torch.manual_seed(0)
        ids.append(torch.ones(1).send(hc.VirtualWorker(id="w")).id_at_location)
    assert ids[0] != ids[1]


def test_a_worker_does_not_know_anothers_ids(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    x = torch.ones(3).send(west)
    out = Slot(grape.session, x._slot.spec)
    grape.session.tell(Call("neg.default", (Ref(x._slot.id),), {}, (out.id,)))
    with pytest.raises(hc.OperatorError, match=f"no slot {x.id_at_location} in this session"):
        grape.session.fetch([out])


@pytest.mark.parametrize(
    "use",
    [
        lambda x, y: x + y,
        lambda x, y: x.add_(y),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.copy_(y),
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: torch.add(x, 1, out=y),
    ],
    ids=range(7),
)
def test_two_places_in_one_operation_name_both(use: Any, schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    x, y = torch.ones(3).send(west), torch.ones(3).send(grape)
    with pytest.raises(hc.PlaceError) as caught:
        use(x, y)
    assert "'westside'" in str(caught.value)
    assert "'grapevine'" in str(caught.value)
    assert ".move(" in str(caught.value)
    assert torch.equal(x.get(), torch.ones(3))
    assert torch.equal(y.get(), torch.ones(3))


def test_a_local_tensor_is_no_pointer(clinic: hc.VirtualWorker) -> None:
    x, local = torch.ones(3).send(clinic), torch.ones(3)
    with pytest.raises(hc.PlaceError, match=r"'clinic' and a local one of shape \(3,\).*\.send\(clinic\)"):
        x + local
    assert torch.equal((x + torch.tensor(2.0)).get(), torch.full((3,), 3.0))  # without dimensions it goes along


# -- threads ----------------------------------------------------------------------------------------------


def test_four_threads_add_at_one_worker(clinic: hc.VirtualWorker) -> None:
    start = threading.Barrier(4, timeout=60)
    results: dict[int, list[float]] = {}

    def work(number: int) -> None:
        x = torch.full((3,), float(number)).send(clinic)
        start.wait()
        found = []
        for step in range(30):
            for _ in range(10):
                x = x + 1
            if step % 10 == 9:
                found.append(x.copy().get()[0].item())
        results[number] = found

    at_once(*(lambda n=n: work(n) for n in range(4)))
    assert results == {n: [n + 100.0, n + 200.0, n + 300.0] for n in range(4)}
    gc.collect()
    assert clinic._objects == {}


CROSSWISE = """
import faulthandler, threading, torch, housecall as hc
faulthandler.dump_traceback_later(30, exit=True)
torch.set_num_threads(1)
def work(worker):
    x = hc.send(torch.ones(3), worker)
    for n in range(1500):
        assert (x + n).get()[0] == 1 + n
threads = [threading.Thread(target=work, args=(hc.VirtualWorker(id=name),)) for name in "ab"]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("done")
"""


def test_two_threads_that_wait_for_two_workers_do_not_lock_each_other_out() -> None:
    """Each wait also flushes the other worker. In a process of its own, which ends itself if it is stuck."""
    done = subprocess.run(
        [sys.executable, "-c", CROSSWISE], capture_output=True, text=True, check=False, env=os.environ, timeout=120
    )
    assert done.stdout == "done\n", done.stderr[-3000:]


def test_a_session_that_is_collected_while_the_live_ones_are_asked_for_disturbs_nobody() -> None:
    """To make room for the answer may be what collects it."""

    class Alone:
        """What only the collector can free."""

        def __init__(self) -> None:
            self.itself = self

    live: Live[Alone] = Live()
    held = [Alone() for _ in range(40)]
    for one in held:
        live.add(one)
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()  # all else is not looked at again, which takes long
    try:
        for late in range(1, 20):  # after so many more objects the collector comes
            live.add(Alone())
            gc.set_threshold(gc.get_count()[0] + late)
            assert len(live.others(held[0])) >= 39
            gc.set_threshold(1 << 30)
            gc.collect()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def test_what_travels_is_counted_both_ways(clinic: hc.VirtualWorker) -> None:
    sent, fetched = clinic.session.bytes_sent, clinic.session.bytes_fetched
    (torch.ones(10).send(clinic) + 1).get()  # type: ignore[attr-defined]  # the hook's
    assert (clinic.session.bytes_sent - sent, clinic.session.bytes_fetched - fetched) == (40, 40)
