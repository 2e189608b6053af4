"""Frames that come again, too early, or from somebody else; and files changed under a worker's feet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from queue import SimpleQueue

import pytest
import torch
from hostile import ASKING

import housecall as hc
from housecall.errors import ProtocolError
from housecall.host.host import Host
from housecall.owner.policy import Budget, Policy, Release, Use
from housecall.program.call import Call
from housecall.transport.arrays import share
from housecall.transport.line import Line
from housecall.transport.parcel import Assembler, is_control, packed
from housecall.transport.stream import PROTOCOL
from housecall.types import Ref
from housecall.wire.messages import (
    Array,
    Fetch,
    Frame,
    Hello,
    Load,
    Put,
    Refused,
    Reply,
    Statistic,
    Statistics,
    Status,
    Welcome,
)
from housecall.wire.packets import control, read_control
from housecall.worker.owner import Owner
from housecall.worker.worker import Worker


class Peer:
    """A hostile peer: it sends what it likes, packet by packet."""

    def __init__(self, host: Host, principal: str = "mallory", session: str = "") -> None:
        self._packets: SimpleQueue[bytes | None] = SimpleQueue()
        self._answers = host.serve(iter(self._packets.get, None), principal)
        self._assembler = Assembler(Reply, 1 << 20)
        self._packets.put(control(Hello(PROTOCOL, session, 0, "test")))
        self.welcome = read_control(next(self._answers))

    def send(self, number: int, *messages: object) -> None:
        for packet in packed(Frame(number, messages)).packets(0):  # type: ignore[arg-type]
            self._packets.put(packet)

    def reply(self) -> Reply | Refused | None:
        for packet in self._answers:
            if is_control(packet):
                said = read_control(packet)
                if isinstance(said, Refused):
                    return said
            elif (whole := self._assembler.feed(packet)) is not None:
                return whole[1]
        return None

    def close(self) -> None:
        self._packets.put(None)


@pytest.fixture
def host() -> Iterator[Host]:
    owner = Owner()
    worker = Worker("clinic", gate=owner.gate)
    worker.catalogue.register("heart", {"x": torch.arange(6.0)})
    owner.policies.register("heart", ASKING)
    host = Host(worker)
    yield host
    host.close()


def test_a_replayed_frame_is_done_once(host: Host) -> None:
    peer = Peer(host)
    assert isinstance(peer.welcome, Welcome)
    peer.send(1, Put(5, share(torch.zeros(2))))
    for _ in range(3):
        peer.send(2, Call("add_.Scalar", (Ref(5), 1.0), {}, ()))
    peer.send(3, Fetch((5,)))
    while not (reply := peer.reply()).results:  # type: ignore[union-attr]
        assert isinstance(reply, Reply)
    assert reply.number == 3  # type: ignore[union-attr]
    assert torch.equal(host.seats[0].door.store[5], torch.ones(2))
    peer.close()


def test_a_replayed_question_for_a_statistic_is_paid_once(host: Host) -> None:
    """The same answer may come again, never another with noise drawn anew."""
    gate = host.worker.gate
    rules = Policy(use=Use(statistics=("*",)), release=Release(statistics=True), budget=Budget(epsilon=1))
    gate.policies.register("heart", rules)  # type: ignore[attr-defined]  # they are `Policies`
    peer = Peer(host)
    for _ in range(3):
        peer.send(1, Statistics("heart", Statistic("sum", "x", (0.0, 6.0)), 0.25))
    peer.send(2, Fetch(()))
    values = set()
    while (reply := peer.reply()).number < 2:  # type: ignore[union-attr]
        values |= {result.values for result in reply.results}  # type: ignore[union-attr]
    assert len(values) == 1
    assert gate.spending is not None
    assert gate.spending.spent(host.worker.catalogue.content("heart")).epsilon == Fraction("0.25")
    peer.close()


def test_a_frame_that_comes_too_early_ends_the_session(host: Host) -> None:
    peer = Peer(host)
    peer.send(1, Put(5, share(torch.zeros(2))))
    peer.send(3, Call("add_.Scalar", (Ref(5), 1.0), {}, ()))
    said: object = peer.reply()
    while isinstance(said, Reply):
        said = peer.reply()
    assert said is None or said.code == "protocol"  # type: ignore[union-attr]  # the stream may end before it is said
    assert host.seats == ()
    peer.close()


@pytest.mark.parametrize("number", [0, -1])
def test_a_frame_without_a_number_is_not_done(number: int) -> None:
    try:
        fresh = Line().accept(number)
    except ProtocolError:
        fresh = False
    assert not fresh


@pytest.mark.parametrize("who", ["eve", "mallory\n", "Mallory", ""])
def test_anothers_token_opens_nothing(host: Host, who: str) -> None:
    peer = Peer(host)
    assert isinstance(peer.welcome, Welcome)
    thief = Peer(host, who, peer.welcome.session)
    assert isinstance(thief.welcome, Refused)
    guess = Peer(host, "mallory", "0" * 32)
    assert isinstance(guess.welcome, Refused)
    assert thief.welcome == guess.welcome
    peer.close()


def test_raw_frames_over_a_stream_take_nothing(host: Host) -> None:
    peer = Peer(host)
    peer.send(1, Load("heart", (1,)), Call("clone.default", (Ref(1),), {}, (2,)), Fetch((1, 2)), Status("0" * 16))
    reply = peer.reply()
    assert isinstance(reply, Reply)
    assert not [item for result in reply.results for item in result.arrays if isinstance(item, Array)]  # type: ignore[union-attr]
    peer.close()


@pytest.fixture(scope="module")
def clinic() -> Iterator[hc.cluster.ClusterWorker]:
    with hc.LocalCluster(["clinic"], threads=1) as cluster:
        cluster[0].add("heart", x=7000 + torch.arange(6.0), policy=ASKING)
        yield cluster[0]


def test_a_process_refuses_too(clinic: hc.cluster.ClusterWorker) -> None:
    x = clinic.dataset("heart").column("x")
    assert "70" not in re.sub(r"\d{10,}", "ID", repr(x))
    for take in (x.clone().get, x.sum().item, lambda: bool(x.sum() > 0), lambda: torch.cat([x, x]).get()):
        with pytest.raises(hc.HousecallError, match=r"release\.approvals"):
            take()


def test_an_edited_policy_lets_nothing_out_of_a_process(clinic: hc.cluster.ClusterWorker) -> None:
    x = clinic.dataset("heart").column("x").clone()
    file = clinic.folder / "policies" / "heart.toml"
    kept = file.read_text()
    file.write_text(Policy.open_to("*").text())
    with pytest.raises(hc.HousecallError, match="heart"):
        x.get()
    file.write_text(kept)
