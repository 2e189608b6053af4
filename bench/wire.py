"""The figures of workers in other processes, over mutual TLS on this machine's loopback. `figures.py` calls it."""

from __future__ import annotations

import json
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import housecall as hc
from housecall.cli._schools import Net
from housecall.cluster import LocalCluster
from housecall.identity.authority import Authority
from housecall.identity.certificate import client_credentials, server_credentials
from housecall.remote import RemoteWorker, reach
from housecall.transport.stream import Dial, Link

BATCH = 64
MB = 1_000_000


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.nll_loss(model(x), y).backward()
    optimizer.step()


def remote_step(model: Any, optimizer: torch.optim.Optimizer, x: Any, y: Any, *, loss_too: bool = False) -> None:
    """The article's batch."""
    model.send(x.location)
    optimizer.zero_grad()
    loss = F.nll_loss(model(x), y)
    loss.backward()
    optimizer.step()
    model.get()
    if loss_too:
        loss.get()


def data(records: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(records, 1, 28, 28, generator=generator), torch.randint(0, 10, (records,), generator=generator)


def loop(workers: Any, epochs: int) -> dict[str, float]:
    """Blocks of 10 batches of each in turn, one thread everywhere; the median ratio, and waits per batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = data(2560)
    plain, model = Net(), Net()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = hc.FederatedDataLoader(TensorDataset(x, y).federate(tuple(workers)), batch_size=BATCH, shuffle=True)
    pairs: list[tuple[float, float]] = []
    batches, before = 0, 0
    for epoch in range(epochs + 1):
        if epoch == 1:
            before = sum(worker.session.waits for worker in workers)
        iterator, orders = iter(loader), torch.randperm(len(x)).split(BATCH)
        for start in range(0, len(orders), 10):
            block = orders[start : start + 10]
            started = time.perf_counter()
            for _ in block:
                remote_step(model, optimizer, *next(iterator))
            between = time.perf_counter()
            for chosen in block:
                plain_step(plain, plain_optimizer, x.index_select(0, chosen), y.index_select(0, chosen))
            ended = time.perf_counter()
            if epoch:  # the first epoch warms up
                pairs.append(((between - started) / len(block), (ended - between) / len(block)))
                batches += len(block)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[3 * len(ratios) // 4],
        "ours_ms": 1e3 * statistics.median(ours for ours, _ in pairs),
        "plain_ms": 1e3 * statistics.median(theirs for _, theirs in pairs),
        "waits": (sum(worker.session.waits for worker in workers) - before) / batches,
    }


# -- a network with a round-trip time -----------------------------------------------------------------------


class Delayed:
    """A stream whose packets arrive `delay` seconds after they left; any number may be under way."""

    def __init__(self, link: Link, delay: float) -> None:
        self._link, self._delay = link, delay
        self._arrived: list[tuple[float, Any]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                item: Any = next(self._link)
            except BaseException as error:  # handed on to whoever waits for the packet
                item = error
            with self._changed:
                self._arrived.append((time.perf_counter() + self._delay, item))
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return

    def __next__(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._arrived)
            due, item = self._arrived.pop(0)
        time.sleep(max(0.0, due - time.perf_counter()))
        if isinstance(item, BaseException):
            raise item
        return item  # type: ignore[no-any-return]

    def cancel(self) -> None:
        self._link.cancel()


def delayed(dial: Dial, round_trip: float) -> Dial:
    def later(outgoing: Iterator[bytes]) -> Iterator[bytes]:
        queue: list[tuple[float, bytes | None]] = []
        changed = threading.Condition()

        def pull() -> None:
            for packet in outgoing:
                with changed:
                    queue.append((time.perf_counter() + round_trip / 2, packet))
                    changed.notify_all()
            with changed:
                queue.append((0.0, None))
                changed.notify_all()

        threading.Thread(target=pull, daemon=True).start()
        while True:
            with changed:
                changed.wait_for(lambda: queue)
                due, packet = queue.pop(0)
            if packet is None:
                return
            time.sleep(max(0.0, due - time.perf_counter()))
            yield packet

    return lambda outgoing: Delayed(dial(later(outgoing)), round_trip / 2)


def round_trips(cluster: LocalCluster, batches: int, *, loss_too: bool) -> float:
    """(Batch time with 50 ms round-trip time - without) / 50 ms; batches of the two kinds take turns."""
    torch.set_num_threads(1)
    url = cluster[0].address
    dial = reach(url, cluster.identity)
    near, far = RemoteWorker(dial, url), RemoteWorker(delayed(dial, 0.05), url)
    x, y = data(BATCH)
    placed = [(worker, x.send(worker), y.send(worker)) for worker in (near, far)]
    model: Any = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    times: dict[Any, list[float]] = {near: [], far: []}
    for _ in range(batches):
        for worker, images, labels in placed:
            started = time.perf_counter()
            remote_step(model, optimizer, images, labels, loss_too=loss_too)
            times[worker].append(time.perf_counter() - started)
    found = (statistics.median(times[far]) - statistics.median(times[near])) / 0.05
    near.close()
    far.close()
    return found


# -- against bare gRPC ------------------------------------------------------------------------------------


def raw_echo(folder: Path, size: int, turns: int, ours: Callable[[], float]) -> tuple[float, float]:
    """Seconds to send `size` bytes over a bare gRPC stream with the same TLS and get them back, and `ours`, in turns.
    The bare server keeps the 1 MB messages it gets and sends the same objects back: nothing is decoded or checked."""
    authority = Authority.create(folder, "bench")
    server_identity = authority.identity("echo", "worker", ("127.0.0.1",))
    client_identity = authority.identity("me", "scientist", ())
    options = (("grpc.max_receive_message_length", -1), ("grpc.http2.lookahead_bytes", 8 << 20))

    def echo(incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:
        kept: list[bytes] = []
        for packet in incoming:
            if packet:
                kept.append(packet)
            else:
                yield from kept
                kept.clear()

    server = grpc.server(ThreadPoolExecutor(4), options=options)
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Raw", handlers),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(lambda: server_identity))
    server.start()
    channel = grpc.secure_channel(f"127.0.0.1:{port}", client_credentials(client_identity), options=options)
    content = bytes(size)
    go, done = threading.Semaphore(0), threading.Event()

    def outgoing() -> Iterator[bytes]:
        while True:
            go.acquire()
            if done.is_set():
                return
            for start in range(0, size, 1 << 20):
                yield content[start : start + (1 << 20)]
            yield b""

    packets = channel.stream_stream("/bench.Raw/Echo")(outgoing())
    bare, own = [], []
    for turn in range(turns + 1):
        started = time.perf_counter()
        go.release()
        target = bytearray(size)  # the bytes must end in one piece of memory here as well
        came = 0
        while came < size:
            packet = next(packets)
            target[came : came + len(packet)] = packet
            came += len(packet)
        bare.append(time.perf_counter() - started)
        own.append(ours())
        if not turn:
            bare.clear(), own.clear()
    done.set()
    go.release()
    channel.close()
    server.stop(0).wait()
    return statistics.median(bare), statistics.median(own)


def large(cluster: LocalCluster, turns: int) -> tuple[float, float]:
    """100 MB, sent and got: bare gRPC's seconds, and ours."""
    torch.set_num_threads(1)
    x = torch.randn(25_000_000)
    worker = cluster[0]

    def ours() -> float:
        started = time.perf_counter()
        pointer = hc.send(x, worker)
        worker.session.forget()  # what is measured is travelling, not remembering
        pointer.get()
        return time.perf_counter() - started

    return raw_echo(cluster.folder / "raw", x.nbytes, turns, ours)


def small_calls(cluster: LocalCluster) -> float:
    """Additions of ten numbers per second, 20,000 issued and then waited for."""
    worker = cluster[0]
    x = torch.ones(10).send(worker)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(20_000):
            y = x + 1
        y.copy().get()
        rates.append(20_000 / (time.perf_counter() - started))
    return statistics.median(rates)


def resident(pid: int) -> float:
    """A process's resident memory, MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MB


def sessions(cluster: LocalCluster, count: int) -> float:
    """A worker's memory after `count` sessions, each with a tensor and a call, over what it was after the first 50."""
    worker = cluster[1]
    dial = reach(worker.address, cluster.identity)

    def one() -> None:
        with RemoteWorker(dial, worker.address) as session:
            (torch.ones(1000).send(session) * 2).get()

    for _ in range(50):
        one()
    before = resident(worker.pid)
    for _ in range(count):
        one()
    left = json.loads((cluster.folder / worker.id / "status.json").read_text())
    assert len(left["sessions"]) <= 2, left
    return resident(worker.pid) / before


def rows(quick: bool) -> list[str]:
    """The rows of the table."""
    found = []
    started = time.perf_counter()
    with LocalCluster(2, threads=1) as cluster:
        up = time.perf_counter() - started
        cnn = loop(list(cluster), 1 if quick else 6)
        trips = round_trips(cluster, 5 if quick else 20, loss_too=False)
        trips_loss = round_trips(cluster, 5 if quick else 20, loss_too=True)
        bare, own = large(cluster, 3 if quick else 9)
        calls = small_calls(cluster)
        memory = sessions(cluster, 50 if quick else 1000)
    spread = f"{cnn['low']:.2f} - {cnn['high']:.2f}"
    found.append(
        f"| article's CNN loop over two worker processes, mutual TLS, 1 thread each / plain torch, 1 thread | "
        f"**{cnn['ratio']:.2f}** (quartiles {spread}; {cnn['ours_ms']:.1f} against {cnn['plain_ms']:.1f} ms) "
        "| <= 1.15 |"
    )
    found.append(f"| round trips waited for, per batch | **{cnn['waits']:.2f}** | 1 |")
    found.append(f"| batch time that 50 ms round-trip time adds, in round trips | **{trips:.2f}** | <= 1.2 |")
    found.append(f"| the same, the loss fetched as well | **{trips_loss:.2f}** | 2 |")
    found.append(
        f"| 100 MB tensor, send + get / a bare gRPC stream of the same bytes with the same TLS | **{own / bare:.2f}** "
        f"({1e3 * own:.0f} against {1e3 * bare:.0f} ms) | <= 1.25 |"
    )
    found.append(f"| small calls per second, one session | **{calls:,.0f}** | >= 20,000 |")
    found.append(f"| worker's memory after 1,000 sessions / after the first 50 | **{memory:.3f}** | <= 1.05 |")
    found.append(f"| two workers up, certificates made and sessions open | **{up:.1f} s** | < 3 s |")
    return found


if __name__ == "__main__":
    hc.TorchHook(torch)
    print("\n".join(rows(quick=True)))
