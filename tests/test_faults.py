"""Faults of every kind, during every operation: exactly once or one clear error, no hang, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar

import fault_matrix
import pytest
import torch
from fault_matrix import BALLAST, FAULTS, ONCE, OPERATIONS, PATIENCE, nothing_left, outcome, settled, within
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import grpc_dial
from tool import tool

from housecall.cluster import LocalCluster
from housecall.errors import WorkerGone
from housecall.host.host import Host
from housecall.host.turns import Turns
from housecall.remote import RemoteWorker, reach
from housecall.testing import SURVIVED, Fault, Faults, Kind, Way, World, faulty, memory_dial
from housecall.transport.parcel import Assembler, packed_reply
from housecall.transport.stream import PROTOCOL, Link, LinkLost, StreamTransport
from housecall.wire.messages import Drop, Failure, Fetch, Frame, Hello, Refused, Reply, Welcome
from housecall.wire.packets import control, read_control
from housecall.worker.worker import Worker


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("way", ["out", "in"])
def test_exactly_once_or_one_clear_error(kind: str, operation: str, way: Way) -> None:
    assert outcome(kind, operation, way) in FAULTS[kind][1]


def test_the_matrix_is_whole() -> None:
    assert len(FAULTS) == 12
    assert list(OPERATIONS) == ["send", "run", "get", "drop", "resume"]


def test_the_table_tells_of_hangs_leaks_and_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make bench` prints, were it not all well."""
    bench = tool("bench/faults.py")
    ends = iter((fault_matrix.Hang("a hang"), fault_matrix.Leak("seats were left"), AssertionError("3 is not 4")))

    def outcome(kind: str, operation: str, way: Way) -> str:
        if error := next(ends, None):
            raise error
        return ONCE

    monkeypatch.setattr(fault_matrix, "outcome", outcome)
    rows = fault_matrix.matrix()
    assert "**117 / 0 / 1 / 1 / 1** | 120 in the first two |" in bench.summary(rows)
    line = "| delayed packet | a hang / a leak: seats were left | wrong: 3 is not 4 / once | once / once |"
    assert line in bench.section(rows)


# -- random programs --------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=2)
STEP = st.one_of(
    st.tuples(st.just("send"), VALUES),
    st.tuples(st.just("add_"), st.integers(0, 5), st.floats(-4, 4, width=32)),
    st.tuples(st.just("mul"), st.integers(0, 5), st.integers(0, 5)),
    st.tuples(st.just("read"), st.integers(0, 5)),
    st.tuples(st.just("drop"), st.integers(0, 5)),
)


def step(values: list[torch.Tensor], what: tuple[Any, ...], worker: RemoteWorker | None) -> list[float] | None:
    """One step on local tensors (without a worker) or on pointers; what it read."""
    name, *args = what
    if name == "send":
        tensor = torch.tensor(args[0])
        values.append(tensor if worker is None else tensor.send(worker))
    elif values:
        value = values[args[0] % len(values)]
        if name == "add_":
            value.add_(args[1])
        elif name == "mul":
            values.append(value * values[args[1] % len(values)])
        elif name == "drop":
            values.pop(args[0] % len(values))
        else:
            return (value.clone() if worker is None else value.clone().get()).tolist()  # type: ignore[no-any-return]
    return None


def same_as_local(program: list[tuple[Any, ...]], worker: RemoteWorker) -> int:
    """Run a program on pointers and on local tensors; how many values are left."""
    local: list[torch.Tensor] = []
    remote: list[torch.Tensor] = []
    for what in program:
        assert step(remote, what, worker) == step(local, what, None)
    assert [value.clone().get().tolist() for value in remote] == [value.tolist() for value in local]
    return len(local)


@settings(max_examples=30, deadline=None)
@given(st.lists(STEP, max_size=30), st.integers(0, 2**32))
def test_any_program_under_any_faults_is_as_local(program: list[tuple[Any, ...]], seed: int) -> None:
    with nothing_left(), World(faults=Faults.seeded(seed, rate=0.15)) as world:
        left = within(lambda: same_as_local(program, world.worker))
        del left
        world.faults.stop()
        within(lambda: world.worker.session.wait())
        assert settled(world) == 0


def test_many_calls_under_many_faults() -> None:
    """Long enough that every kind strikes, with frames of the most messages."""
    faults = Faults.seeded(5, rate=0.3)
    with nothing_left(), World(faults=faults) as world:

        def count() -> list[float]:
            counter = torch.zeros(2).send(world.worker)
            for n in range(4000):
                counter.add_(1)
                if n % 100 == 0:
                    counter.clone().get()
            return counter.get().tolist()  # type: ignore[no-any-return]

        assert within(count) == [4000.0] * 2
    assert {fault.kind for fault in faults.struck} == set(SURVIVED)


# -- over gRPC --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_same_over_grpc(seed: int) -> None:
    """Real connections that are cut: each break cancels its channel."""
    kinds = (Kind.BREAK_BEFORE, Kind.BREAK_AFTER, Kind.REORDERED, Kind.DUPLICATED, Kind.DELAYED, Kind.REFUSED)
    faults = Faults.seeded(seed, rate=0.12, kinds=kinds)
    dice = random.Random(seed)
    program: list[tuple[Any, ...]] = [("send", [1.0, 2.0])]
    for _ in range(60):
        program.append(
            dice.choice([("add_", dice.randrange(6), 1.0), ("mul", dice.randrange(6), 0), ("read", dice.randrange(6))])
        )
    host = Host(Worker("clinic"))
    with grpc_dial(host) as dial:
        worker = RemoteWorker(faulty(dial, faults), "grpc", patience=PATIENCE)
        within(lambda: same_as_local(program, worker))
        assert any(fault.kind in (Kind.BREAK_BEFORE, Kind.BREAK_AFTER, Kind.REORDERED) for fault in faults.struck)
        faults.stop()
        within(worker.close)
        host.close()
    assert host.worker.sessions == []


# -- sessions ---------------------------------------------------------------------------------------------


def test_what_was_lost_is_named() -> None:
    with nothing_left(), World() as world:
        counter = torch.zeros(3).send(world.worker)
        world.worker.session.wait()
        world.faults.strike(Fault(Kind.BREAK_BEFORE, "out"))
        world.before_next_dial(world.restart)
        counter.add_(1)
        counter.add_(1)
        with pytest.raises(
            WorkerGone, match=r"worker 'clinic' no longer knows this session.* lost; connect again"
        ) as gone:
            within(world.worker.session.wait)
        assert "Unanswered: 2 messages, the oldest issued at" in str(gone.value)
        assert "counter.add_(1)" in str(gone.value)
        assert "test_faults.py" in str(gone.value)


def test_a_lease_that_ended_frees_the_slots_and_refuses_the_old_pointers() -> None:
    with nothing_left(), World(lease_s=60) as world:
        counter = torch.zeros(3).send(world.worker)
        world.worker.session.wait()
        world.lapse()
        assert world.host.seats == ()
        assert world.host.worker.sessions == []
        assert world.host.counters["expired"] == 1
        with pytest.raises(WorkerGone, match="the session's lease ended"):
            within(counter.get)


def test_who_comes_back_within_the_lease_finds_everything() -> None:
    with nothing_left(), World(lease_s=60) as world:
        counter = torch.zeros(3).send(world.worker)
        world.worker.session.wait()
        world.faults.cut()
        (seat,) = world.host.seats
        with seat.changed:
            assert seat.changed.wait_for(lambda: seat.stream == 0, PATIENCE)
        world.clock.advance(59)
        world.host.tidy()
        assert within(counter.add_(1).get).tolist() == [1.0] * 3
        world.clock.advance(1000)  # present, so no lease runs
        world.host.tidy()
        assert len(world.host.seats) == 1


def test_a_worker_that_cannot_be_reached_is_given_up_after_patience() -> None:
    faults = Faults()
    with nothing_left(), World(faults=faults, patience=0.05) as world:
        counter = torch.zeros(3).send(world.worker)
        world.worker.session.wait()
        faults.strike(*(Fault(Kind.REFUSED, "dial", n) for n in range(1, 100)))
        faults.cut()
        with pytest.raises(WorkerGone, match=r"cannot be reached \(connection refused; tried for 0.05 s\)"):
            within(counter.get)
        faults.stop()


def test_a_worker_that_accepts_and_never_answers_is_given_up() -> None:
    class Mute:
        def __init__(self) -> None:
            self.cancelled = threading.Event()

        def __next__(self) -> bytes:
            assert self.cancelled.wait(PATIENCE), "nobody gave this link up"
            raise LinkLost("cancelled")

        def cancel(self) -> None:
            self.cancelled.set()

    with pytest.raises(WorkerGone, match=r"cannot be reached \(what answers there said nothing for 1 s; tried for"):
        within(lambda: StreamTransport(lambda outgoing: Mute(), name="clinic", patience=0.01))


@pytest.mark.slow
def test_a_worker_that_hangs_is_given_up_within_the_documented_time() -> None:
    """docs/workers.md, Connecting: its connections stand, its kernel accepts new ones, nobody answers."""
    with LocalCluster(("stopped",), patience=1.0) as (worker,):
        counter = torch.zeros(3).send(worker)
        worker.session.wait()
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(WorkerGone, match="said nothing for 1 s"):
                within(counter.add_(1).get, 60)
            assert time.monotonic() - began < 30 + 2 * 1.0 + 3  # and what a busy machine needs
        finally:
            os.kill(worker.pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_long_computation_is_not_taken_for_a_hang() -> None:
    """Longer than the pings and their patience together: on this machine some 40 s."""
    settings = {"limits": {"call_gflop": 10**6, "call_mb": 4000}}
    with LocalCluster(("busy",), patience=1.0, threads=1, **settings) as (worker,):
        x = torch.ones(11_000, 11_000).send(worker)
        assert within((x @ x)[0, 0].get, 600).item() == 11_000
        assert worker.session.transport.reconnections == 0  # type: ignore[attr-defined]


def test_a_close_over_a_broken_stream_still_frees_the_slots() -> None:
    with nothing_left(), World() as world:
        kept = torch.zeros(3).send(world.worker)
        world.worker.session.wait()
        world.faults.cut()
        within(world.worker.close)
        assert world.host.seats == ()
        assert world.host.worker.sessions == []
        del kept


def test_a_slow_reader_keeps_little_at_the_worker_and_nobody_else_waiting() -> None:
    """A reads nothing at all of what it fetches; the worker holds what it keeps for A, and B is served."""
    with nothing_left(), World() as world:
        slow = Faults(delay_s=0.001)
        reader = world.connect("slow", slow)
        slow.strike(Fault(Kind.SLOW, "in"))
        big = BALLAST.send(reader)
        reader.session.wait()
        seat = next(seat for seat in world.host.seats if seat.principal == "slow")
        most = 0
        for _ in range(8):
            assert torch.equal(within(big.clone().get), BALLAST)
            most = max(most, seat.line.kept_bytes)
            assert within(torch.ones(2).send(world.worker).add_(1).get).tolist() == [2.0, 2.0]
        assert most < 3 * BALLAST.nbytes


# -- principals -------------------------------------------------------------------------------------------


def answer(host: Host, token: str, principal: str) -> Refused | Welcome:
    stream = host.serve(iter([control(Hello(PROTOCOL, token, 0, "test"))]), principal)
    found = within(lambda: read_control(next(stream)))
    stream.close()  # type: ignore[attr-defined]
    assert isinstance(found, Refused | Welcome)
    return found


def test_a_token_of_another_is_refused_like_one_that_never_was() -> None:
    with nothing_left(), World() as world:
        (seat,) = world.host.seats
        stolen, invented = answer(world.host, seat.token, "mallory"), answer(world.host, "0" * 32, "mallory")
        assert isinstance(stolen, Refused)
        assert stolen == invented
        assert within(torch.ones(2).send(world.worker).get).tolist() == [1.0, 1.0]  # and nothing happened to its owner
        assert isinstance(answer(world.host, seat.token, "me"), Welcome)


def test_principals_never_see_each_others_tensors() -> None:
    with nothing_left(), World() as world:
        alice, bob = world.connect("alice"), world.connect("bob")
        hers = torch.tensor([1.0, 2.0]).send(alice)
        alice.tag(hers, "#secret")
        alice.session.wait()
        assert [found.location for found in alice.search("#secret")] == [alice]
        assert bob.search("#secret") == bob.search() == []
        ref = hers._slot.id
        for stranger in (ref, ref + 12345):  # hers, and nobody's: no difference but the number
            (value,) = bob.session.ask(Fetch((stranger,))).arrays  # type: ignore[union-attr]
            assert isinstance(value, Failure)
            assert value.reason == (
                f"no slot {stranger} in this session: it was dropped, or belongs to another worker or session"
            )
        bob.session.tell(Drop((ref,)))
        bob.clear()
        assert hers.get().tolist() == [1.0, 2.0]


class Steps:
    """A worker whose sessions do nothing but say whose step it was; the first waits until the second has asked."""

    id = "clinic"

    def __init__(self) -> None:
        self.events: list[str] = []
        self.begun, self.asked = threading.Event(), threading.Event()

    def open(self, principal: str, role: str = "scientist") -> Any:
        events, begun, asked = self.events, self.begun, self.asked

        class Door:
            store: ClassVar[dict[int, Any]] = {}

            def work(self, frame: Frame) -> Iterator[None]:
                for _ in frame.messages:
                    if principal == "many":
                        begun.set()
                        assert asked.wait(PATIENCE)
                    events.append(principal)
                    yield
                return Reply(frame.number, (), ())

            def close(self) -> None:
                pass

        return Door()


def test_a_session_cannot_starve_another() -> None:
    """1,000 calls of one are queued and begun when the single call of another comes: it waits for about one slice."""
    worker = Steps()
    with nothing_left():
        host = Host(worker)  # type: ignore[arg-type]
        host.turns.close()
        host.turns = Turns(slice_s=0.0)  # a step each
        many, one = (StreamTransport(memory_dial(lambda: host, who), name="clinic") for who in ("many", "one"))
        for number in range(1, 101):
            many.send(Frame(number, tuple(Drop((n,)) for n in range(10))))
        assert worker.begun.wait(PATIENCE)
        one.send(Frame(1, (Drop((1,)),)))
        (seat,) = (seat for seat in host.seats if seat.principal == "one")
        with host.turns._changed:
            assert host.turns._changed.wait_for(lambda: seat in host.turns._ring, PATIENCE)
        worker.asked.set()
        assert within(one.receive).number == 1
        for number in range(1, 101):
            assert within(many.receive).number == number
        assert worker.events.index("one") <= 2
        assert worker.events.count("many") == 1000
        within(many.close)
        within(one.close)
        host.close()


def test_draining_does_what_has_come_and_then_says_so() -> None:
    worker = Steps()
    with nothing_left():
        host = Host(worker)  # type: ignore[arg-type]
        transport = StreamTransport(memory_dial(lambda: host, "many"), name="clinic")
        for number in (1, 2, 3):
            transport.send(Frame(number, (Drop((1,)), Drop((2,)))))
        (seat,) = host.seats
        assert worker.begun.wait(PATIENCE)
        with seat.changed:
            while seat.line.received < 3:  # the coming of a frame wakes nobody, so look
                seat.changed.wait(0.001)
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(host.drain(PATIENCE)), name="housecall-drain")
        drain.start()
        worker.asked.set()
        assert [within(transport.receive).number for _ in range(3)] == [1, 2, 3]
        assert worker.events == ["many"] * 6
        transport.send(Frame(4, (Drop((1,)),)))
        with pytest.raises(WorkerGone, match="worker 'clinic' was shut down"):
            within(transport.receive)
        drain.join(PATIENCE)
        assert drained == [True]
        assert worker.events == ["many"] * 6


# -- real processes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(("killed", "drained", "proxied"), patience=1.0) as cluster:
        yield cluster


def test_a_killed_worker_says_what_was_lost_and_a_restarted_one_refuses_old_pointers(cluster: LocalCluster) -> None:
    worker = cluster["killed"]
    patient = RemoteWorker(reach(worker.address, cluster.identity), worker.address, patience=PATIENCE)
    counter, other = torch.zeros(3).send(worker), torch.zeros(3).send(patient)
    assert counter.add_(1).clone().get().tolist() == [1.0] * 3
    assert other.add_(1).clone().get().tolist() == [1.0] * 3
    os.kill(worker.pid, signal.SIGKILL)
    counter.add_(1)
    with pytest.raises(WorkerGone, match=r"worker 'killed' cannot be reached .*tried for 1 s") as gone:
        within(worker.session.wait)
    assert "values it held for this session are lost" in str(gone.value)
    assert "Unanswered: 1 message, the oldest issued at" in str(gone.value)
    assert "counter.add_(1)" in str(gone.value)

    listen = worker.address.removeprefix("grpcs://")
    command = [sys.executable, "-m", "housecall.service", str(cluster.folder / "killed"), "--listen", listen]
    again = subprocess.Popen(
        [*command, "--parent", str(os.getpid())], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert again.stdout is not None
        assert json.loads(within(again.stdout.readline, 60.0))["address"] == listen
        with pytest.raises(WorkerGone, match="worker 'killed' no longer knows this session: it was restarted"):
            within(other.get)
        with RemoteWorker(reach(worker.address, cluster.identity), worker.address) as anew:
            assert within(torch.ones(2).send(anew).add_(1).get).tolist() == [2.0, 2.0]
    finally:
        again.kill()
        again.wait()
        assert again.stdout is not None
        again.stdout.close()


def test_a_terminated_worker_answers_what_came_and_says_that_it_was_shut_down(cluster: LocalCluster) -> None:
    worker = cluster["drained"]
    counter = torch.zeros(3).send(worker)
    for _ in range(1000):
        counter.add_(1)
    before = counter.clone()
    worker.session.flush()
    assert before.get().tolist() == [1000.0] * 3
    os.kill(worker.pid, signal.SIGTERM)
    process = next(process for process in cluster._processes if process.pid == worker.pid)
    assert process.wait(PATIENCE) == 0
    with pytest.raises(WorkerGone, match="worker 'drained' was shut down"):
        within(counter.get)


class Proxy:
    """A TCP connection in between: it can change a byte of what passes, or end all connections."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.flips: dict[str, int] = {}  # way -> after how many bytes the next byte is changed
        self.flipped = 0
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._where)
            except OSError:
                return
            self._sockets += [near, far]
            for way, source, sink in (("out", near, far), ("in", far, near)):
                self._threads.append(threading.Thread(target=self._pass, args=(way, source, sink), daemon=True))
                self._threads[-1].start()

    def _pass(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := bytearray(source.recv(65536)):
                if way in self.flips:
                    self.flips[way] -= len(data)
                    if self.flips[way] < 0:
                        del self.flips[way]
                        data[len(data) // 2] ^= 1
                        self.flipped += 1
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listening.close()
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)
        for end in self._sockets:
            end.close()


def test_bytes_that_change_on_the_wire_never_become_values(cluster: LocalCluster) -> None:
    """TLS notices, the connection ends, the session resumes: every call runs once, every element is right."""
    host, port = cluster["proxied"].address.removeprefix("grpcs://").rsplit(":", 1)
    proxy = Proxy(host, int(port))
    try:
        url = f"grpcs://127.0.0.1:{proxy.port}"
        with RemoteWorker(reach(url, cluster.identity), url, patience=PATIENCE) as worker:
            counter = torch.zeros(3).send(worker)
            strikes = (("out", 0), ("in", 0), ("out", 1_500_000), ("in", 1_500_000), ("cut", 0))
            for total, (way, after) in enumerate(strikes, 1):
                if way == "cut":
                    proxy.cut()
                else:
                    proxy.flips[way] = after
                counter.add_(1)
                big = BALLAST.send(worker)
                assert torch.equal(within((big + counter[0]).get), BALLAST + total)
                assert counter.clone().get().tolist() == [float(total)] * 3
            transport = worker.session.transport
            assert isinstance(transport, StreamTransport)
            assert proxy.flipped == 4
            assert transport.reconnections >= 5
    finally:
        proxy.close()


def test_a_frame_that_came_by_the_stream_before_is_not_waited_for() -> None:
    """The worker welcomes a stream while the last frame of the one before is still under way; its reply comes by the
    new one before that has sent the frame again."""
    reply = packed_reply(Reply(1, (), (), ()))
    reply.number = 1
    welcome = control(Welcome(PROTOCOL, "token", 0, 60.0, 1 << 20, "clinic"))
    scripts = deque([deque([welcome]), deque([welcome, *reply.packets(0)])])
    streams: list[Iterator[bytes]] = []

    class Scripted:
        def __init__(self, script: deque[bytes]) -> None:
            self._script = script

        def __next__(self) -> bytes:
            if not self._script:
                raise LinkLost("it broke")
            return self._script.popleft()

        def cancel(self) -> None:
            """Nothing to give up."""

    def dial(outgoing: Iterator[bytes]) -> Link:
        streams.append(outgoing)
        return Scripted(scripts.popleft())

    transport = StreamTransport(dial, name="clinic")
    transport.send(Frame(1, ()))
    assert transport.receive().number == 1
    transport.send(Frame(2, ()))
    sent = streams[-1]
    assert isinstance(read_control(next(sent)), Hello)
    arrived = Assembler(Frame).feed(within(lambda: next(sent), 10))
    assert arrived is not None
    assert arrived[1].number == 2
