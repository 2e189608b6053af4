"""The table of figures: `make bench` writes docs/figures.md. Plain torch and pointers take turns in one process.

Every ratio is the median over pairs (pointers / plain torch) that were timed one right after the other, so that
the machine's ups and downs fall on both. Run it on a quiet machine; it says what machine it was.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import faults
import owner
import recorded
import torch
import torch.nn.functional as F
import wire
from recorded import MLP
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import housecall as hc
from housecall.cli._schools import Net

PAGE = Path(__file__).parent.parent / "docs" / "figures.md"
BATCH = 64


def data(records: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(records, 1, 28, 28, generator=generator), torch.randint(0, 10, (records,), generator=generator)


class Plain:
    """The loop in plain torch, on the same batches: an index list, two `index_select`s, a step."""

    def __init__(self, make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.model, self.x, self.y = make(), x, y
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def step(self, chosen: torch.Tensor) -> torch.Tensor:
        x, y = self.x.index_select(0, chosen), self.y.index_select(0, chosen)
        self.optimizer.zero_grad()
        loss = F.nll_loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss


class Federated:
    """The article's loop over two virtual workers."""

    def __init__(self, make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.schools = hc.VirtualWorker(id="westside"), hc.VirtualWorker(id="grapevine")
        federated = TensorDataset(x, y).federate(self.schools)
        self.loader = hc.FederatedDataLoader(federated, batch_size=BATCH, shuffle=True)
        self.model: Any = make()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def step(self, batch: Any) -> Any:
        x, y = batch
        model = self.model.send(x.location)
        self.optimizer.zero_grad()
        loss = F.nll_loss(model(x), y)
        loss.backward()
        self.optimizer.step()
        model.get()
        return loss

    def waits(self) -> int:
        return sum(school.session.waits for school in self.schools)


def loop(make: Callable[[], nn.Module], threads: int, epochs: int, records: int = 2560) -> dict[str, float]:
    """Blocks of 20 batches of each in turn; the ratio of each pair of blocks, and the medians."""
    torch.set_num_threads(threads)
    x, y = data(records)
    plain, federated = Plain(make, x, y), Federated(make, x, y)
    pairs: list[tuple[float, float]] = []
    waits = batches = 0
    for epoch in range(epochs + 1):
        before, waited = federated.waits(), 0
        iterator = iter(federated.loader)
        orders = torch.randperm(records).split(BATCH)
        while True:
            ours, count = 0.0, 0
            for _ in range(20):
                started = time.perf_counter()
                batch = next(iterator, None)
                if batch is None:
                    break
                federated.step(batch)
                ours += time.perf_counter() - started
                count += 1
            if not count:
                break
            theirs = 0.0
            for chosen in orders[:count]:
                started = time.perf_counter()
                plain.step(chosen)
                theirs += time.perf_counter() - started
            batches += count
            if epoch:  # the first epoch warms up
                pairs.append((ours / count, theirs / count))
        waited = federated.waits() - before
        waits += waited
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    del batch
    federated.optimizer.zero_grad()
    return {
        "ours_ms": 1e3 * statistics.median(ours for ours, _ in pairs),
        "plain_ms": 1e3 * statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[3 * len(ratios) // 4],
        "waits": waits / batches,
    }


def operation() -> float:
    """2,000 additions, then a wait: microseconds each."""
    torch.set_num_threads(1)
    worker = hc.VirtualWorker(id="w")
    a, b = torch.ones(10).send(worker), torch.ones(10).send(worker)
    times = []
    for _ in range(15):
        started = time.perf_counter()
        for _ in range(2000):
            c = a + b
        worker.session.wait()
        times.append((time.perf_counter() - started) / 2000)
    c.get()
    return 1e6 * statistics.median(times)


def travel() -> float:
    """A tensor of 4 MB, sent and fetched: milliseconds."""
    worker = hc.VirtualWorker(id="w")
    x = torch.randn(1024, 1024)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        x.send(worker).get()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def overlap() -> float:
    """Two jobs of large operators at two workers, beside each other / one after the other, one thread each."""
    torch.set_num_threads(1)
    schools = hc.VirtualWorker(id="westside"), hc.VirtualWorker(id="grapevine")
    inputs = [torch.randn(900, 900).send(school) for school in schools]

    def job(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = (x @ x).tanh()
        return x.sum()

    ratios = []
    for turn in range(8):
        started = time.perf_counter()
        for x in inputs:
            job(x).item()
        between = time.perf_counter()
        for result in [job(x) for x in inputs]:
            result.item()
        ended = time.perf_counter()
        if turn:
            ratios.append((ended - between) / (between - started))
    return statistics.median(ratios)


def slots() -> int:
    """What two workers hold after 1,000 batches, when the data set and the loop are gone."""
    torch.set_num_threads(1)
    federated = Federated(MLP, *data(2560))
    done = 0
    while done < 1000:
        for batch in federated.loader:
            federated.step(batch)
            done += 1
    schools = federated.schools
    del federated, batch
    gc.collect()
    return sum(len(school._objects) for school in schools)


def peak(kind: str) -> None:
    """Train on 6,400 images once and print this process's peak memory in MB (called in a process of its own)."""
    torch.set_num_threads(2)
    x, y = data(6400)
    if kind == "plain":
        plain = Plain(Net, x, y)
        for chosen in torch.randperm(len(x)).split(BATCH):
            plain.step(chosen)
    elif kind == "loader":
        loaded = Plain(Net, x, y)
        for images, labels in DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True):
            loaded.optimizer.zero_grad()
            F.nll_loss(loaded.model(images), labels).backward()
            loaded.optimizer.step()
    else:
        federated = Federated(Net, x, y)
        del x, y
        for batch in federated.loader:
            federated.step(batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory() -> tuple[float, float]:
    """Peak memory of the federated run and of plain torch, each in a process of its own, MB."""
    found = []
    for kind in ("federated", "plain"):
        command = [sys.executable, __file__, "--peak", kind]
        runs = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
        found.append(statistics.median(runs))
    return found[0], found[1]


def ratio_row(name: str, found: dict[str, float], reach: str) -> str:
    spread = f"{found['low']:.2f} - {found['high']:.2f}"
    return (
        f"| {name} | **{found['ratio']:.2f}** (quartiles {spread}; "
        f"{found['ours_ms']:.2f} against {found['plain_ms']:.2f} ms) | {reach} |"
    )


def table(quick: bool) -> tuple[str, str]:
    """Measure everything; the rows of the page, and its table of faults."""
    hook = hc.TorchHook(torch)
    cnn_epochs, mlp_epochs = (1, 5) if quick else (8, 60)
    rows = []
    addition, sent, beside = operation(), travel(), overlap()
    cnn = loop(Net, 2, cnn_epochs)
    rows.append(ratio_row("article's CNN loop, batch 64, 2 threads / plain torch", cnn, "<= 1.03"))
    rows.append(ratio_row("the same, 1 thread", loop(Net, 1, cnn_epochs), "-"))
    rows.append(
        ratio_row("784-32-10 MLP loop, batch 64, 1 thread / plain torch", loop(MLP, 1, mlp_epochs), "<= 2.5, then 1.5")
    )
    rows.append(
        f"| a pointer operation, issued and done (2,000 additions, then a wait) | **{addition:.1f} us** | <= 15 us |"
    )
    rows.append(f"| 4 MB tensor, send + get | **{sent:.3f} ms** | <= 0.5 ms |")
    rows.append(f"| messages waited for, per batch of the article's loop | **{cnn['waits']:.2f}** | 1 |")
    rows.append(
        f"| two independent jobs at two workers / one after the other, 1 thread each | **{beside:.2f}** | <= 0.65 |"
    )
    ours, plain = memory()
    rows.append(f"| peak memory / plain torch | **{ours / plain:.2f}** ({ours:.0f} against {plain:.0f} MB) | <= 1.3 |")
    rows.append(f"| slots left after 1,000 batches | **{slots()}** | 0 |")
    rows.extend(wire.rows(quick))
    rows.extend(owner.rows(quick))
    rows.extend(recorded.rows(quick))
    outcomes = faults.measured()
    rows.append(faults.summary(outcomes))
    hook.remove()
    return "\n".join(rows), faults.section(outcomes)


def page(rows: str, outcomes: str) -> str:
    """docs/figures.md."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    return f"""# Figures

Written by `make bench`. Pointers and plain torch take turns in the same process, blocks of 20 batches each; a ratio
is the median over the pairs of blocks. Peak memory: each in a process of its own, median of three. Workers in other
processes are those of a `LocalCluster`: mutual TLS on loopback, one thread for each worker, for plain torch as well.
They let glibc keep freed pages (`service.keep_memory`); plain torch runs here as it comes.

{date.today():%Y-%m-%d}; {os.cpu_count()} cores ({cpu}), Python {platform.python_version()}, torch {torch.__version__},
housecall {hc.__version__}; load average at the end {os.getloadavg()[0]:.1f}.

| what | measured | to reach |
| --- | --- | --- |
{rows}

## Faults

What came of each operation while a fault struck what it sent / what came back: done exactly *once*, or one clear
*error* that says what was lost. An error is right where a message was changed, a packet was cut in two, or the worker
was restarted. Each cell is a world of its own in one process (`housecall.testing.World`); `python bench/faults.py` runs
these alone.

{outcomes}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it runs")
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    parser.add_argument("--peak", choices=["plain", "loader", "federated"], help=argparse.SUPPRESS)
    chosen_options = parser.parse_args()
    if chosen_options.peak:
        hc.TorchHook(torch)
        peak(chosen_options.peak)
    else:
        text = page(*table(chosen_options.quick))
        print(text)
        if not chosen_options.print:
            PAGE.write_text(text)
