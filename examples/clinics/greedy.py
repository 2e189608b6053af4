"""The same scientist, greedy: every way to more than she was given, and what she reads instead.

    python greedy.py [--data FOLDER]

Each attempt is a line of what people write; none is clever.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hospitals import hospitals
from table import COLUMNS
from torch import nn
from torch.nn import functional as F
from train import owners, train

import housecall as hc
from housecall.errors import HousecallError

Attempt = tuple[str, Callable[[], Any]]


def told(attempt: Callable[[], Any]) -> str:
    """What an attempt is answered. Raises `AssertionError` for one that was let through."""
    try:
        got = attempt()
    except HousecallError as error:
        return str(error).partition("\n")[0]
    raise AssertionError(f"this was to be refused, and gave {got!r}")


def greedy(westside: Any, grapevine: Any) -> Iterator[tuple[str, str]]:
    """(what she tries, what she is told), one after the other. The owner of westside approves one model meanwhile."""
    heart = westside.search("#heart")[0]
    for name, attempt in (*on_records(heart, westside, grapevine), *on_training(heart, westside)):
        yield name, told(attempt)
    yield from on_approval(heart, westside)


def on_records(heart: Any, westside: Any, grapevine: Any) -> list[Attempt]:
    """The records themselves, as they are or by a detour."""
    x, y = heart.column("x"), heart.column("y")

    def written_into_hers() -> Any:
        mine = torch.zeros(2, len(COLUMNS)).send(westside)
        mine.view(-1)[: len(COLUMNS)] = x[0]
        return mine.get()

    def branch() -> Any:
        return "a patient over 65" if (x[0, 0] > 1).item() else "a younger one"

    return [
        ("a column", lambda: x.get()),
        ("one record, through a view", lambda: x[0].get()),
        ("one record, written into a tensor of hers", written_into_hers),
        ("a mean over all records", lambda: x.mean(0).get()),
        ("a branch on a record", branch),
        ("as many rows as there are patients", lambda: x[y == 1].shape),
        ("a record as an error's text", lambda: torch.zeros(1).send(westside)[(x[0, :1] * 1000).long()].get()),
        ("on to the other hospital", lambda: x.clone().move(grapevine)),
        ("a change of the hospital's records", lambda: x.zero_().sum().get()),
    ]


def on_training(heart: Any, westside: Any) -> list[Attempt]:
    """What training makes of the records."""
    x, y = heart.column("x"), heart.column("y")
    model = nn.Linear(len(COLUMNS), 1).send(westside)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    loss = F.binary_cross_entropy_with_logits(model(x[:1]).squeeze(1), y[:1])
    loss.backward()
    optimizer.step()
    return [
        ("the loss on one patient", loss.item),
        ("the gradient of one patient", lambda: model.weight.grad.get()),
        ("the optimizer's state", lambda: optimizer.state[model.weight]["momentum_buffer"].get()),
        ("the model, without asking", lambda: model.get()),
        ("a copy of the model", lambda: copy.deepcopy(model.weight.detach()).get()),
    ]


def on_approval(heart: Any, westside: Any) -> Iterator[tuple[str, str]]:
    """More than was approved. The owner approves a trained model; the second request she denies."""
    model = nn.Linear(len(COLUMNS), 1).send(westside)
    optimizer = train(model, heart)
    optimizer.zero_grad()
    approved = model.request("the trained model")
    approved.wait(timeout=600, every=0.2)
    with torch.no_grad():
        model.weight[0] = heart.column("x")[0]
    yield "a record, put into the model after its approval", told(model.get)
    with torch.no_grad():
        bias = model.bias.detach().clone()
    yield "a clone of what was approved", told(bias.get)
    again = model.request("and the same again, improved")
    yield "a second request", told(lambda: again.wait(timeout=600, every=0.2)).replace(again.id, "ID")


def main() -> None:
    """All of it, on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder: see table.py")
    options = parser.parse_args()
    torch.manual_seed(0)
    hc.TorchHook(torch)
    with hospitals(options.data) as cluster, owners(cluster, "--answer", "approve-then-deny", "--count", "2"):
        for name, text in greedy(*cluster):
            print(f"{name}\n    {text}\n")


if __name__ == "__main__":
    main()
