"""What the owner's rules cost: labels and policy on the article's loop, the ledger. `figures.py` calls it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from wire import BATCH, data, remote_step

import housecall as hc
from housecall.cli._schools import Net
from housecall.owner.ledger import Entry, Ledger
from housecall.privacy import pipeline


def labels(epochs: int) -> tuple[float, float, float]:
    """The article's CNN loop on owned data with an open policy / on the same data sent; blocks of 10 batches in turn,
    one thread. The median ratio and its quartiles."""
    torch.set_num_threads(1)
    x, y = data(1280)
    sent, owned = hc.VirtualWorker(id="sent"), hc.VirtualWorker(id="owned")
    owned.add("digits", x=x.clone(), y=y.clone(), policy=hc.Policy.open_to("me"))
    loaders: list[Any] = [
        hc.FederatedDataLoader(TensorDataset(x, y).federate((sent,)), batch_size=BATCH),
        hc.FederatedDataLoader(owned.dataset("digits"), batch_size=BATCH),
    ]
    models: list[Any] = [Net(), Net()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    ratios = []
    for epoch in range(epochs + 1):
        iterators = [iter(loader) for loader in loaders]
        for _ in range(len(x) // BATCH // 10):
            spent = []
            for iterator, model, optimizer in zip(iterators, models, optimizers, strict=True):
                started = time.perf_counter()
                for _ in range(10):
                    remote_step(model, optimizer, *next(iterator))
                spent.append(time.perf_counter() - started)
            if epoch:
                ratios.append(spent[1] / spent[0])
    ratios.sort()
    return statistics.median(ratios), ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]


def ledger(entries: int) -> tuple[float, float]:
    """Entries appended per second, each with its fsync, and verified per second."""
    entry = Entry("release", "scientist 'alice'", ("heart",), "0" * 64, decision="allowed by heart")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with Ledger(Path(folder)) as book:
            for _ in range(entries):
                book.append(entry)
            written = entries / (time.perf_counter() - started)
            started = time.perf_counter()
            book.verify()
            return written, entries / (time.perf_counter() - started)


def scores(records: int) -> float:
    """Records per second of a mean score: the loss of a 784-32-10 network, by the owner's loop of one at a time."""
    torch.set_num_threads(1)
    clinic = hc.VirtualWorker(id="clinic")
    rules = hc.Policy(
        use=hc.Use(plans=("me",)),
        release=hc.Release(metrics=hc.Metrics(minimum=1, noise=10)),
        budget=hc.Budget(epsilon=1),
    )
    clinic.add("digits", x=torch.randn(records, 784), y=torch.randint(0, 10, (records,)), policy=rules)
    model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    recorded = hc.record(
        lambda model, x, y: F.cross_entropy(model(x), y), model, torch.zeros(1, 784), torch.zeros(1).long()
    )
    started = time.perf_counter()
    clinic.dataset("digits").evaluate(recorded, model, "x", "y", bounds=(0, 10))
    return records / (time.perf_counter() - started)


def noised(values: int) -> float:
    """Seconds that clipping and exact Gaussian noise take for an update of so many values."""
    update = np.random.default_rng(0).normal(size=values)
    started = time.perf_counter()
    pipeline.passed((hc.Clip(norm=1.0), hc.Noise(multiplier=8.0)), update)
    return time.perf_counter() - started


def rows(quick: bool) -> list[str]:
    """The rows of the table."""
    ratio, low, high = labels(2 if quick else 12)
    written, verified = ledger(200 if quick else 2000)
    return [
        f"| labels and policy on the article's CNN loop, 1 thread: owned data / the same data sent | **{ratio:.2f}** "
        f"(quartiles {low:.2f} - {high:.2f}) | <= 1.02 |",
        f"| ledger: entries appended per second, each with its fsync | **{written:,.0f}** | - |",
        f"| ledger: entries verified per second | **{verified:,.0f}** | - |",
        f"| mean score of a 784-32-10 network: records per second | **{scores(2_000):,.0f}** | - |",
        f"| an update of a million values, clipped, exact noise added | **{noised(1_000_000):.2f} s** | - |",
    ]


if __name__ == "__main__":
    hc.TorchHook(torch)
    print("\n".join(rows(quick=True)))
