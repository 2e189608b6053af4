"""The article's training step as a recorded program, against plain torch: rows for the table of figures.

Blocks of the two take turns in one process, as in `figures`; a ratio is the median over the pairs of blocks. Both take
the same batches from data that is in place: two `index_select`s, a step, the loss as a number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import housecall as hc
from housecall.cli._schools import Net

BATCH, RECORDS = 64, 2560


class MLP(nn.Module):
    """784-32-10: little to compute, so the cost of pointers lies bare."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.layers(x), dim=1)


Step = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def step_of(optimizer: torch.optim.Optimizer) -> Step:
    """The article's step."""

    def step(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def model_of(make: Callable[[], nn.Module]) -> tuple[Any, Step]:
    """A model and its step."""
    torch.manual_seed(0)
    model = make()
    return model, step_of(torch.optim.SGD(model.parameters(), lr=0.01))


def timed(count: int, one: Callable[[int], object]) -> float:
    """Seconds for each of `count`."""
    started = time.perf_counter()
    for at in range(count):
        one(at)
    return (time.perf_counter() - started) / count


def pairs(make: Callable[[], nn.Module], threads: int, blocks: int, count: int) -> dict[str, float]:
    """Medians of plain torch, the recorded step and the same calls one by one, in ms; ratios with quartiles."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(RECORDS, 1, 28, 28, generator=generator), torch.randint(0, 10, (RECORDS,), generator=generator)
    plain, plain_step = model_of(make)
    model, step = model_of(make)
    issued, issued_step = model_of(make)
    recorded = hc.record(step, model, x[:BATCH], y[:BATCH])
    worker = hc.VirtualWorker(id="school")
    model.send(worker)
    issued.send(worker)
    there_x, there_y = x.send(worker), y.send(worker)
    orders = torch.randperm(RECORDS, generator=generator).split(BATCH)
    there = [order.send(worker) for order in orders]

    def at_home(at: int) -> float:
        chosen = orders[at % len(orders)]
        return plain_step(plain, x.index_select(0, chosen), y.index_select(0, chosen)).item()

    def away(one: Any, own: Any) -> Callable[[int], object]:
        def run(at: int) -> object:
            chosen = there[at % len(there)]
            return one(own, there_x.index_select(0, chosen), there_y.index_select(0, chosen)).get()

        return run

    runs = at_home, away(recorded, model), away(issued_step, issued)
    found = [[timed(count, one) for one in runs] for _ in range(blocks + 1)][1:]  # the first block warms up
    ratios = sorted(own / theirs for theirs, own, _ in found)
    return {
        "plain_ms": 1e3 * statistics.median(row[0] for row in found),
        "recorded_ms": 1e3 * statistics.median(row[1] for row in found),
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[3 * len(ratios) // 4],
        "issued": statistics.median(row[1] / row[2] for row in found),
    }


def rows(quick: bool = False) -> list[str]:
    """Lines of the table."""
    found = []
    for name, make, blocks, count, goal in (
        ("article's CNN", Net, 6 if quick else 20, 5 if quick else 10, "<= 1.0"),
        ("784-32-10 MLP", MLP, 15 if quick else 60, 40, "<= 1.2"),
    ):
        for threads in (1, 2):
            one = pairs(make, threads, blocks, count)
            found.append(
                f"| {name}, recorded step, batch {BATCH}, {threads} thread{'s'[: threads - 1]} / plain torch "
                f"| **{one['ratio']:.2f}** (quartiles {one['low']:.2f} - {one['high']:.2f}; "
                f"{one['recorded_ms']:.2f} against {one['plain_ms']:.2f} ms) | {goal} |"
            )
            found.append(f"| the same / its calls issued one by one | **{one['issued']:.2f}** | < 1 |")
    return found


if __name__ == "__main__":
    hc.TorchHook(torch)
    print("\n".join(rows(quick=True)))
