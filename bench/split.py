"""Where the time of one batch of the small MLP's loop goes: `python bench/split.py`.

Pointers and plain torch take turns in one process with one thread, blocks of 20 batches each; a line is the median over
the batches, in microseconds. What a batch costs on average is a little more: after a block of the other, the
processor's caches are cold.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import figures
import torch
import torch.nn.functional as F

import housecall as hc
from housecall.worker.plan import Plan
from housecall.worker.worker import WorkerSession

Found = dict[str, list[float]]
BLOCK = 20
_clock = time.perf_counter


class Batch:
    """Sums of one batch, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)

    def timed(self, name: str, act: Callable[[], Any]) -> Any:
        """What comes of it; the time that it took is added to the sum of this name."""
        began = _clock()
        found = act()
        self.sums[name] += _clock() - began
        return found

    def end(self, found: Found) -> None:
        """The batch is over: its sums are kept, and begin anew."""
        for name, seconds in self.sums.items():
            found.setdefault(name, []).append(1e6 * seconds)
        self.sums.clear()


@contextmanager
def watched(batch: Batch) -> Iterator[None]:
    """Within: what the worker takes is summed as well, and in it what the compiled program takes."""
    handle, run = WorkerSession.handle, Plan.run

    def steps(plan: Plan, *args: Any, **kwargs: Any) -> Iterator[None]:
        batch.timed("  of it the program's steps", lambda: list(run(plan, *args, **kwargs)))
        return iter(())

    WorkerSession.handle = lambda door, frame: batch.timed("worker", lambda: handle(door, frame))
    Plan.run = steps
    try:
        yield
    finally:
        WorkerSession.handle, Plan.run = handle, run


def step(batch: Batch, model: Any, optimizer: Any, x: Any, y: Any, prefix: str = "") -> Any:
    """One step, in its parts."""
    batch.timed(prefix + "zero_grad", optimizer.zero_grad)
    loss = batch.timed(prefix + "forward", lambda: F.nll_loss(model(x), y))
    batch.timed(prefix + "backward", loss.backward)
    batch.timed(prefix + "optimizer", optimizer.step)
    return loss


def compared(batches: int) -> Found:
    """Both loops, a block of each in turn."""
    found: Found = {}
    batch = Batch()
    x, y = figures.data(2560)
    plain, federated = figures.Plain(figures.MLP, x, y), figures.Federated(figures.MLP, x, y)

    def away(given: Any) -> None:
        model = batch.timed("send", lambda: federated.model.send(given[0].location))
        loss = step(batch, model, federated.optimizer, *given)
        batch.timed("get, without the worker", model.get)
        batch.sums["get, without the worker"] -= batch.sums["worker"]
        del loss

    for _ in range(1 + batches // 40):
        iterator = iter(federated.loader)
        for orders in (torch.randperm(len(x)).split(figures.BATCH)[:BLOCK] for _ in range(2)):
            with watched(batch):
                for _ in orders:
                    away(batch.timed("loader", lambda: next(iterator)))  # noqa: B023  # called here
                    batch.end(found)
            for chosen in orders:
                rows = batch.timed("plain: rows", lambda: (x.index_select(0, chosen), y.index_select(0, chosen)))  # noqa: B023  # as above
                step(batch, plain.model, plain.optimizer, *rows, prefix="plain: ")
                batch.end(found)
    return {name: taken[len(taken) // 10 :] for name, taken in found.items()}  # the first ones warm up


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hook = hc.TorchHook(torch)
    found = compared(options.batches)
    hook.remove()
    for name, taken in found.items():
        print(f"{name:32s} {statistics.median(taken):8.1f}")


if __name__ == "__main__":
    main()
