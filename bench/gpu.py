"""A worker whose home is a GPU, against plain torch on that GPU: `python bench/gpu.py`, on a machine that has one.

The worker is a process of its own, over mTLS on loopback (`LocalCluster(device="cuda")`); plain torch runs in this one.
Blocks of 20 batches of each take turns; a ratio is the median over the pairs of blocks. In "visits" the model travels
to the worker and home again with each batch, as in the article's loop; in "stays" it does so once for each block.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import housecall as hc
from housecall.cli._schools import Net

RECORDS, BLOCK, PAIRS = 20_480, 20, 12


def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    loss = F.nll_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


class Plain:
    def __init__(self, model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        self.model, self.x, self.y = model.cuda(), x.cuda(), y.cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def block(self, orders: list[torch.Tensor]) -> None:
        for chosen in orders:
            at = chosen.cuda()
            step(self.model, self.optimizer, self.x.index_select(0, at), self.y.index_select(0, at))
        torch.cuda.synchronize()


class Away:
    def __init__(self, model: Any, x: torch.Tensor, y: torch.Tensor, worker: Any, *, stays: bool) -> None:
        self.model, self.worker, self.stays = model, worker, stays
        self.x, self.y = x.send(worker), y.send(worker)  # type: ignore[attr-defined]  # the hook's
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def block(self, orders: list[torch.Tensor]) -> None:
        if self.stays:
            self.model.send(self.worker)
        for chosen in orders:
            at = chosen.send(self.worker)  # type: ignore[attr-defined]  # the hook's
            if not self.stays:
                self.model.send(self.worker)
            step(self.model, self.optimizer, self.x.index_select(0, at), self.y.index_select(0, at))
            if not self.stays:
                self.model.get()
        if self.stays:
            self.model.get()


def timed(act: Callable[[], None]) -> float:
    """Milliseconds for each batch of a block."""
    started = time.perf_counter()
    act()
    return 1e3 * (time.perf_counter() - started) / BLOCK


def compared(batch: int, worker: Any, *, stays: bool) -> tuple[float, float, float, float]:
    """ms with pointers, ms plain, ratio; and the largest difference of a parameter after all batches."""
    torch.manual_seed(0)
    x, y = torch.randn(RECORDS, 1, 28, 28), torch.randint(0, 10, (RECORDS,))
    model: Any = Net()
    away, plain = Away(copy.deepcopy(model), x, y, worker, stays=stays), Plain(model, x, y)
    pairs = []
    for number in range(PAIRS + 2):
        orders = list(torch.randperm(RECORDS).split(batch)[:BLOCK])
        pair = timed(lambda: away.block(orders)), timed(lambda: plain.block(orders))  # noqa: B023  # called here
        if number >= 2:  # the first ones warm up
            pairs.append(pair)
    apart = max(
        float((one - other.cpu()).detach().abs().max())
        for one, other in zip(away.model.parameters(), plain.model.parameters(), strict=True)
    )
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return ours, theirs, statistics.median(a / b for a, b in pairs), apart


def main() -> None:
    """Print the table."""
    hook = hc.TorchHook(torch)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}")
    print("| loop | batch | ms, pointers | ms, plain | ratio | parameters apart |")
    print("| --- | --- | --- | --- | --- | --- |")
    with hc.LocalCluster(1, device="cuda") as (worker,):
        for stays in (True, False):
            for batch in (64, 1024):
                ours, theirs, ratio, apart = compared(batch, worker, stays=stays)
                name = "stays" if stays else "visits"
                print(f"| {name} | {batch} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} | {apart:.1e} |", flush=True)
    hook.remove()


if __name__ == "__main__":
    main()
