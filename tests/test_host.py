"""The host of many sessions: what waits takes room that is bounded and shared, nobody holds it from others, and who is
revoked gets no further, whatever the session is at."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
import torch
from streams import grpc_dial, memory_dial

from housecall.errors import PolicyError, WorkerGone
from housecall.host.host import ENDED, Host
from housecall.host.room import ARRIVAL_S, Claim, Room
from housecall.owner.ledger import Entry
from housecall.program.call import Items
from housecall.testing import Clock
from housecall.transport.parcel import packed
from housecall.transport.stream import PROTOCOL, StreamTransport
from housecall.wire.messages import Array, Bye, Call, Drop, Fetch, Frame, Hello, Put, Refused, Reply, Value, Welcome
from housecall.wire.packets import control, read_control
from housecall.worker.gate import Gate, Who
from housecall.worker.limits import Limits
from housecall.worker.refusals import MOST_REFUSALS
from housecall.worker.worker import Worker

PATIENCE = 30.0
MB = 1_000_000


def until(true: Callable[[], Any]) -> None:
    """Wait for something that wakes nobody."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.001)


def beside(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


class Waiting:
    """A worker whose sessions do a message each time they may (`go`); what they did is in `done`."""

    id = "clinic"

    def __init__(self) -> None:
        self.may, self.done = threading.Semaphore(0), []  # type: ignore[var-annotated]
        self.begun = threading.Event()

    def go(self, times: int = 1) -> None:
        self.may.release(times)

    def open(self, principal: str, role: str = "scientist") -> Any:
        worker = self

        class Door:
            store: ClassVar[dict[int, Any]] = {}

            def work(self, frame: Frame) -> Iterator[None]:
                for message in frame.messages:
                    worker.begun.set()
                    assert worker.may.acquire(timeout=PATIENCE)
                    if isinstance(message, Drop) and message.ids == (0,):
                        raise RuntimeError("no step should")
                    worker.done.append((principal, frame.number))
                    yield
                return Reply(frame.number, (), ())

            def close(self) -> None:
                pass

        return Door()


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    worker = Waiting()
    yield worker
    worker.go(10_000)


def a_host(worker: Any, **options: Any) -> Host:
    host = Host(worker, **options)
    host._closed.set()  # the janitor comes when the test calls it
    host._janitor.join(PATIENCE)
    return host


def put(number: int, nbytes: int) -> Frame:
    return Frame(number, (Put(number, Array(None, torch.zeros(nbytes, dtype=torch.uint8))),))


class Stream:
    """One stream by hand: packets are fed, what comes is read."""

    def __init__(self, host: Host, principal: Any, token: str = "", received: int = 0) -> None:
        self._sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.send(control(Hello(PROTOCOL, token, received, "test")))
        self._came = host.serve(iter(self._sent.get, None), principal)
        first = read_control(next(self._came))
        assert isinstance(first, Welcome), first
        self.token = first.session

    def send(self, *packets: bytes) -> None:
        for packet in packets:
            self._sent.put(packet)

    def frame(self, frame: Frame, first: int | None = None) -> None:
        self.send(*list(packed(frame).packets(0))[:first])

    def rest(self) -> list[bytes]:
        return list(self._came)

    def last(self) -> Any:
        return read_control(next(self._came))

    def hang_up(self) -> None:
        self._sent.put(None)


# -- room -------------------------------------------------------------------------------------------------


def take(room: Room, session: str, principal: str, nbytes: int) -> threading.Thread:
    """Take room, on a thread of its own that ends when there was some."""
    thread = beside(lambda: room.take(session, principal, nbytes, lambda: True))
    until(lambda: not thread.is_alive() or room._waiting)
    return thread


def test_a_single_frame_has_room_whatever_its_size() -> None:
    room = Room(100, 25)
    assert room.take("s", "alice", 1000, lambda: True)
    assert room.used == 1000
    room.give_back("s", "alice", 1000)
    assert (room.used, room._sessions, room._principals) == (0, {}, {})


def test_a_session_has_its_part_and_a_principal_half() -> None:
    room = Room(100, 25)
    for session in ("a", "b"):
        assert room.take(session, "alice", 25, lambda: True)
    same, third = take(room, "a", "alice", 1), take(room, "c", "alice", 1)
    assert not room.wanted  # they wait for what is their own
    assert not take(room, "x", "bob", 25).is_alive()  # and keep nobody else waiting
    assert same.is_alive()
    assert third.is_alive()
    room.give_back("a", "alice", 25)
    same.join(PATIENCE)
    third.join(PATIENCE)
    assert room.used == 52


def test_who_waits_longest_comes_first_however_much_it_is() -> None:
    room = Room(100, 100)
    assert room.take("a", "alice", 50, lambda: True)
    assert room.take("b", "bob", 40, lambda: True)
    large = take(room, "c", "carol", 500)
    assert room.wanted
    small = beside(lambda: room.take("d", "dave", 5, lambda: True))  # there would be room, but not for ever
    until(lambda: len(room._waiting) == 2)
    room.give_back("a", "alice", 50)
    assert small.is_alive()
    room.give_back("b", "bob", 40)
    large.join(PATIENCE)
    assert room.used == 500
    room.give_back("c", "carol", 500)
    small.join(PATIENCE)
    assert room.used == 5


def test_who_does_not_want_it_any_more_takes_nothing() -> None:
    room = Room(10, 10)
    room.take("a", "alice", 10, lambda: True)
    gone = threading.Event()
    found: list[bool] = []
    thread = beside(lambda: found.append(room.take("b", "bob", 5, lambda: not gone.is_set())))
    until(lambda: room._waiting)
    gone.set()
    room.look_again()
    thread.join(PATIENCE)
    assert found == [False]
    assert room.used == 10


def test_a_claim_is_late_when_its_sender_is() -> None:
    clock = Clock()
    claim = Claim(Room(100, 100), Room(100 * MB, 100 * MB), "s", "alice", lambda: True, clock)
    assert not claim.is_late()
    claim.head(10)
    claim.blobs(20 * MB)
    clock.advance(ARRIVAL_S + 20)
    assert not claim.is_late()
    clock.advance(1)
    assert claim.is_late()
    claim.release()
    claim.release()


# -- the inbox --------------------------------------------------------------------------------------------


def test_frames_that_wait_are_bounded_by_bytes_not_only_by_number(waiting: Waiting) -> None:
    host = a_host(waiting, inbox_bytes=8 * MB)
    alice, second, bob = (StreamTransport(memory_dial(host, who), name="clinic") for who in ("alice", "alice", "bob"))
    for number in range(1, 21):
        alice.send(put(number, MB // 2))
        second.send(put(number, MB // 2))
    until(lambda: len(host.blobs._waiting) == 2)
    assert host.blobs.used == 4 * MB  # 2 MB a session, of 10 MB that each wants to send
    bob.send(put(1, MB))
    until(lambda: host.blobs.used == 5 * MB)
    waiting.go(1000)
    for number in range(1, 21):
        assert alice.receive().number == second.receive().number == number
    assert bob.receive().number == 1
    assert host.blobs.used == host.heads.used == 0
    for one in (alice, second, bob):
        one.close()
    host.close()


def test_a_frame_larger_than_all_room_is_done_when_it_is_alone(waiting: Waiting) -> None:
    host = a_host(waiting, inbox_bytes=MB)
    waiting.go(1000)
    alice = StreamTransport(memory_dial(host, "alice"), name="clinic")
    for number in range(1, 4):
        alice.send(put(number, 3 * MB))
    assert [alice.receive().number for _ in range(3)] == [1, 2, 3]
    alice.close()
    host.close()


def test_heads_take_room_as_well(waiting: Waiting) -> None:
    """MessagePack is terse: a head of 4 MB can become 160 MB of Python's objects."""
    host = a_host(waiting)
    alice = StreamTransport(memory_dial(host), name="clinic")
    for number in range(1, 30):
        alice.send(Frame(number, tuple(Drop((n,)) for n in range(100_000))))
    until(lambda: host.heads._waiting)
    assert len(host.seats[0].inbox) < 29
    assert host.heads.used <= host.heads.each
    alice._give_up_link()
    until(lambda: not host.seats[0].stream)
    host.end(host.seats[0], Refused("session", "enough"))
    assert host.heads.used == 0
    waiting.go(1000)
    host.close()


def test_who_stops_in_the_middle_of_a_frame_does_not_hold_others_up_for_ever(waiting: Waiting) -> None:
    clock = Clock()
    host = a_host(waiting, inbox_bytes=4 * MB, clock=clock)
    waiting.go(1000)
    mallory = Stream(host, "mallory")
    mallory.frame(put(1, 6 * MB), first=1)  # all there is, by itself; the rest never comes
    until(lambda: host.blobs.used)
    clock.advance(1000)
    host.tidy()
    assert len(host.seats) == 1  # nobody minds
    bob = StreamTransport(memory_dial(host, "bob"), name="clinic")
    bob.send(put(1, MB))
    until(lambda: host.blobs.wanted)
    host.tidy()
    said = mallory.last()
    assert said.code == "limit"
    assert "waited too long for the rest of a frame" in said.reason
    mallory.hang_up()
    assert bob.receive().number == 1
    assert host.counters["late"] == 1
    assert host.blobs.used == 0
    bob.close()
    host.close()


def test_a_stream_that_breaks_gives_back_what_came_in_part(waiting: Waiting) -> None:
    host = a_host(waiting)
    stream = Stream(host, "alice")
    stream.frame(put(1, 3 * MB), first=2)
    until(lambda: host.blobs.used == 3 * MB)
    stream.hang_up()
    until(lambda: not host.blobs.used and not host.heads.used)
    again = Stream(host, "alice", stream.token)
    again.frame(put(1, 3 * MB))
    waiting.go()
    until(lambda: waiting.done == [("alice", 1)])
    again.hang_up()
    host.close()


@pytest.mark.parametrize("breach", ["number", "acknowledgement", "twice"])
def test_whatever_becomes_of_a_frame_its_room_comes_back(waiting: Waiting, breach: str) -> None:
    host = a_host(waiting)
    waiting.go(1000)
    stream = Stream(host, "mallory")
    frame = put(2 if breach == "number" else 1, 3 * MB)
    stream.send(*packed(frame).packets(7 if breach == "acknowledgement" else 0))
    if breach == "twice":
        stream.send(*packed(frame).packets(0))
        until(lambda: host.counters["bytes_in"] > 6 * MB)
    else:
        assert stream.last().code == "protocol"
    stream.hang_up()
    until(lambda: not host.blobs.used and not host.heads.used)
    host.close()


# -- ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [100])
def test_why_a_session_is_cut_is_always_the_last_word(waiting: Waiting, times: int) -> None:
    host = a_host(waiting)
    for _ in range(times):
        told = list(host.serve(iter([control(Hello(PROTOCOL, "", 0, "x")), b"\xffrest"]), "mallory"))
        last = read_control(told[-1])
        assert isinstance(last, Refused)
        assert last.code == "protocol"
    host.close()


def test_what_still_comes_after_a_refusal_is_passed_over_so_that_it_is_heard(waiting: Waiting) -> None:
    host = a_host(waiting)
    stream = Stream(host, "mallory")
    stream.send(b"\xffrest")
    said = stream.last()
    assert said.code == "protocol"
    stream.frame(put(1, 3 * MB))  # as one who has not read it yet
    stream.hang_up()
    assert stream.rest() == []
    host.close()


def test_a_session_that_ended_itself_says_why_to_whoever_resumes_it(waiting: Waiting) -> None:
    host = a_host(waiting)
    stream = Stream(host, "alice")
    (seat,) = host.seats
    stream.hang_up()
    until(lambda: not seat.stream)
    seat.finish(Refused("limit", "kept too much"))
    for _ in range(2):  # before the host has tidied up, and after
        (said,) = host.serve(iter([control(Hello(PROTOCOL, stream.token, 0, "x"))]), "alice")
        assert read_control(said) == Refused("limit", "kept too much")
        (said,) = host.serve(iter([control(Hello(PROTOCOL, stream.token, 0, "x"))]), "bob")
        assert read_control(said).code == "session"  # type: ignore[union-attr]
        host.tidy()
    host.close()


def test_of_sessions_that_ended_nothing_is_kept_but_why() -> None:
    host = a_host(Worker("clinic"))
    seats = []
    for _ in range(ENDED + 10):
        seat = host.seat(Hello(PROTOCOL, "", 0, "x"), "alice")
        seats.append(weakref.ref(seat))
        host.end(seat, Refused("limit", "enough"))
    del seat
    gc.collect()
    assert not [one for one in seats if one() is not None]
    assert len(host._ended) == ENDED
    host.close()


def test_one_principal_has_so_many_sessions_and_others_have_theirs() -> None:
    host = a_host(Worker("clinic"))
    for _ in range(64):
        host.seat(Hello(PROTOCOL, "", 0, "x"), "alice")
    (said,) = host.serve(iter([control(Hello(PROTOCOL, "", 0, "x"))]), "alice")
    assert "holds 64 sessions of alice already" in read_control(said).reason  # type: ignore[union-attr]
    host.seat(Hello(PROTOCOL, "", 0, "x"), "bob")
    host.close()


def test_an_error_of_the_workers_own_ends_one_session(waiting: Waiting, caplog: pytest.LogCaptureFixture) -> None:
    host = a_host(waiting)
    waiting.go(1000)
    alice, bob = (StreamTransport(memory_dial(host, who), name="clinic") for who in ("alice", "bob"))
    alice.send(Frame(1, (Drop((0,)),)))
    with pytest.raises(WorkerGone, match="had an error of its own"):
        alice.receive()
    assert "no step should" in caplog.text
    bob.send(Frame(1, (Drop((1,)),)))
    assert bob.receive().number == 1
    bob.close()
    host.close()


def test_closing_does_not_wait_for_ever_for_an_operation(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("housecall.host.host.CLOSE_S", 0.01)
    host = a_host(waiting)
    alice = StreamTransport(memory_dial(host, "alice"), name="clinic")
    alice.send(Frame(1, (Drop((1,)),)))
    assert waiting.begun.wait(PATIENCE)
    assert not host.drain(0.01)
    assert not host.close()
    with pytest.raises(WorkerGone, match="was shut down"):
        alice.receive()
    waiting.go()
    assert host.turns.close(PATIENCE)


def test_who_goes_on_sending_does_not_hold_up_the_end(waiting: Waiting) -> None:
    host = a_host(waiting)
    alice = Stream(host, "alice")
    alice.frame(Frame(1, (Drop((1,)),)))
    assert waiting.begun.wait(PATIENCE)
    drained: list[bool] = []
    drain = beside(lambda: drained.append(host.drain(PATIENCE)))
    until(lambda: host._draining)
    alice.frame(put(2, 3 * MB))
    until(lambda: host.blobs.used == 3 * MB)
    waiting.go(1000)
    assert [read_control(one).code for one in alice.rest()[1:]] == ["draining"]  # type: ignore[union-attr]
    alice.hang_up()
    drain.join(PATIENCE)
    assert drained == [True]
    assert waiting.done == [("alice", 1)]
    until(lambda: not host.blobs.used)


def test_what_is_cut_at_the_end_is_said(waiting: Waiting, caplog: pytest.LogCaptureFixture) -> None:
    host = a_host(waiting)
    alice = StreamTransport(memory_dial(host, "alice"), name="clinic")
    for number in (1, 2):
        alice.send(Frame(number, (Drop((1,)),)))
    until(lambda: len(host.seats[0].inbox) == 2)
    threading.Timer(0.1, waiting.go, [1000]).start()
    assert not host.drain(0)
    assert "cut: 2 frames of alice were not done within 0 s" in caplog.text


# -- revocation -------------------------------------------------------------------------------------------


class Standings(dict[str, Any]):
    def __call__(self, who: str) -> Any:
        return self.get(who, "good")


@pytest.fixture
def standings() -> Standings:
    return Standings()


def test_who_is_revoked_and_idle_is_cut(standings: Standings) -> None:
    host = a_host(Worker("clinic"), standing=standings)
    alice, bob = Stream(host, "alice"), Stream(host, "bob")
    standings["alice"] = "revoked"
    host.tidy()
    assert alice.last() == Refused("identity", "no longer admits this identity: its certificate was revoked")
    assert [seat.principal for seat in host.seats] == ["bob"]
    alice.hang_up()
    bob.hang_up()
    host.close()


def test_who_is_revoked_while_away_is_cut_as_well(standings: Standings) -> None:
    host = a_host(Worker("clinic"), standing=standings)
    alice = Stream(host, "alice")
    alice.hang_up()
    until(lambda: not host.seats[0].stream)
    standings["alice"] = "revoked"
    host.tidy()
    assert host.seats == ()
    host.close()


def test_who_is_revoked_gets_no_further_with_what_is_under_way(waiting: Waiting, standings: Standings) -> None:
    host = a_host(waiting, standing=standings)
    host.turns._slice_s = 0.0
    alice = Stream(host, "alice")
    alice.frame(Frame(1, tuple(Drop((n,)) for n in range(1, 100))))
    alice.frame(Frame(2, (Drop((1,)),)))
    assert waiting.begun.wait(PATIENCE)
    (seat,) = host.seats
    until(lambda: len(seat.inbox) == 2)
    standings["alice"] = "revoked"
    waiting.go(1000)
    assert alice.last().code == "identity"
    alice.hang_up()
    assert host.turns.wait_idle(PATIENCE)
    assert len(waiting.done) <= 1
    host.close()


def test_an_answer_does_not_leave_to_who_is_revoked(standings: Standings) -> None:
    host = a_host(Worker("clinic"), standing=standings)
    alice = Stream(host, "alice")
    alice.frame(Frame(1, (Put(1, Array(None, torch.zeros(3 * MB, dtype=torch.uint8))), Fetch((1,)))))
    (seat,) = host.seats
    until(lambda: seat.line.kept_bytes > 3 * MB)  # it is done, and waits to be read
    standings["alice"] = "revoked"
    assert alice.last().code == "identity"
    alice.hang_up()
    assert alice.rest() == []
    host.close()


def test_a_frame_of_who_is_revoked_is_not_taken(waiting: Waiting, standings: Standings) -> None:
    host = a_host(waiting, standing=standings)
    alice = Stream(host, "alice")
    standings["alice"] = "revoked"
    alice.frame(Frame(1, (Drop((1,)),)))
    assert alice.last().code == "identity"
    alice.hang_up()
    assert host.counters["frames"] == 0
    host.close()


class Alice(str):
    """Her name is the same, her certificate is not."""

    __slots__ = ()


def test_a_certificate_that_ends_ends_its_stream_and_the_next_one_resumes(waiting: Waiting) -> None:
    ended: list[Any] = []
    host = a_host(waiting, standing=lambda who: "ended" if any(who is one for one in ended) else "good")
    first, second = Alice("alice"), Alice("alice")
    stream = Stream(host, first)
    stream.frame(Frame(1, (Drop((1,)),)))
    until(lambda: host.counters["frames"])
    ended.append(first)
    host.tidy()
    assert stream.rest() == []  # not a refusal: the stream ends, the session waits
    waiting.go(1000)
    (said,) = host.serve(iter([control(Hello(PROTOCOL, stream.token, 0, "x"))]), first)
    assert read_control(said) == Refused("identity", "does not admit this identity: its certificate has ended")
    again = Stream(host, second, stream.token)
    until(lambda: waiting.done)
    again.send(control(Bye()))
    again.hang_up()
    until(lambda: host.seats == ())
    host.close()


@pytest.mark.parametrize("after", [1, 3, 7])
def test_over_grpc_too_the_reason_reaches_whoever_is_in_the_middle_of_sending(after: int, standings: Standings) -> None:
    host = a_host(Worker("clinic"), standing=standings)
    with grpc_dial(host) as dial:
        alice = StreamTransport(dial, name="clinic", patience=PATIENCE)

        def sending() -> None:
            for number in range(1, 1000):
                alice.send(put(number, 5 * MB))
                alice.receive()
                if number == after:
                    standings["alice"] = "revoked"

        with pytest.raises(WorkerGone, match="its certificate was revoked"):
            sending()
        host.close()


# -- what is counted --------------------------------------------------------------------------------------


def test_refused_calls_are_counted() -> None:
    host = a_host(Worker("clinic", Limits(call_bytes=1000)))
    alice = StreamTransport(memory_dial(host, "alice"), name="clinic")
    bomb = Call("zeros.default", (Items((1000, 1000)),), {}, (1,))
    alice.send(Frame(1, (bomb, Fetch((1,)), Call("no.such", (), {}, (2,)))))
    (value,) = alice.receive().results
    assert isinstance(value, Value)
    assert host.counters["refused_calls"] >= 2
    assert host.counters["failed_calls"] >= host.counters["refused_calls"]
    alice.close()
    host.close()


def test_refusals_without_end_fill_no_ledger() -> None:
    written: list[Entry] = []
    now = [datetime(2026, 11, 26, tzinfo=UTC)]

    class Pages:
        append = staticmethod(written.append)
        entries = staticmethod(tuple)

    gate = Gate(ledger=Pages(), now=lambda: now[0])  # type: ignore[arg-type]

    def ask(name: str, times: int) -> None:
        for _ in range(times):
            with pytest.raises(PolicyError):
                gate.load(Who(name, "scientist"), "heart")

    ask("mallory", 1000)
    ask("alice", 1)
    assert len(written) == MOST_REFUSALS + 1
    now[0] += timedelta(minutes=1)
    ask("mallory", 2)
    assert len(written) == MOST_REFUSALS + 4
    assert written[-3].decision == "980 refusals more were counted"
    assert "counted" not in written[-2].decision + written[-1].decision
