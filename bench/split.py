"""Where the time of one batch of the small MLP's loop goes: `python bench/split.py`.

Pointers and plain torch take turns in one process with one thread, blocks of 20 batches each; a line is the median over
the batches, in microseconds. The same loop is then run with a `__torch_dispatch__` that does nothing but give back a
new tensor of the right shape: what torch itself takes for the calls of a batch, and no session could go below.
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
from housecall.pointers.tensor import PointerTensor
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


def floor(batches: int) -> Found:
    """The loop's calls with a dispatch that only makes tensors; between two batches plain torch takes one, so that the
    processor's caches are as cold as in the real loop."""
    found: Found = {}
    batch = Batch()
    x, y = figures.data(2560)
    plain = figures.Plain(figures.MLP, x, y)
    worker = hc.VirtualWorker(id="floor")
    model: Any = figures.MLP().send(worker)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    there = x[: figures.BATCH].send(worker), y[: figures.BATCH].send(worker)
    real: Any = PointerTensor.__dict__["__torch_dispatch__"]
    made: list[Any] = []  # by each call: how its results are made, and their slots; `None` if it gives back an argument
    at = 0

    def noted(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = real.__func__(cls, func, types, args, kwargs)
        given = result if isinstance(result, tuple) else (result,)
        same = any(result is arg for arg in args)
        made.append(None if same else [((cls, *one._slot.spec.wrapper), one._slot) for one in given])
        return result

    def nothing(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nonlocal at
        known, at = made[at], at + 1
        if known is None:
            return args[0]
        results = []
        for wrapper, slot in known:
            results.append(torch.Tensor._make_wrapper_subclass(*wrapper))
            results[-1]._slot = slot
        return results[0] if len(results) == 1 else tuple(results)

    try:
        PointerTensor.__torch_dispatch__ = classmethod(noted)
        step(batch, model, optimizer, *there)
        batch.sums.clear()
        PointerTensor.__torch_dispatch__ = classmethod(nothing)
        for chosen in (torch.randperm(len(x)).split(figures.BATCH) * batches)[:batches]:
            plain.step(chosen)
            at = 0
            step(batch, model, optimizer, *there, prefix="floor: ")
            batch.end(found)
    finally:
        PointerTensor.__torch_dispatch__ = real
    found["floor: calls"] = [float(len(made))]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hook = hc.TorchHook(torch)
    found = compared(options.batches) | floor(options.batches)
    hook.remove()
    for name, taken in found.items():
        print(f"{name:32s} {statistics.median(taken):8.1f}")


if __name__ == "__main__":
    main()
