"""The same scientist, greedy: every way to more than she was given, and what she reads instead.

    python greedy.py [--data FOLDER]

Each attempt is a line of what people write; none is clever.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hospitals import hospitals
from table import COLUMNS
from torch import nn
from torch.nn import functional as F
from train import owners, right, training

import housecall as hc
from housecall.errors import HousecallError

Attempt = tuple[str, Callable[[], Any]]


def told(attempt: Callable[[], Any]) -> str:
    """What an attempt is answered. Raises `AssertionError` for one that was let through."""
    try:
        got = attempt()
    except HousecallError as error:
        text = str(error).partition("\n")[0]
        return text.partition("PolicyError: ")[2] or text  # which operator it was does not matter
    raise AssertionError(f"this was to be refused, and gave {got!r}")


def greedy(westside: Any, grapevine: Any) -> Iterator[tuple[str, str]]:
    """(what she tries, what she is told), one after the other. The owner of westside approves one run meanwhile."""
    heart = westside.search("#heart")[0]
    for name, attempt in (*on_records(heart, westside, grapevine), *on_training(heart, westside)):
        yield name, told(attempt)
    yield "a score, until its noise averages out", told(lambda: on_scores(heart))
    yield from on_approval(heart, westside)


def on_scores(heart: Any) -> list[float]:
    """A hundred times the same question: their mean would have a tenth of the noise."""
    model = nn.Linear(len(COLUMNS), 1)
    return [heart.evaluate(right, model, "x", "y", bounds=(0, 1)).value for _ in range(100)]


def on_records(heart: Any, westside: Any, grapevine: Any) -> list[Attempt]:
    """The records themselves, as they are or by a detour."""
    x, y = heart.column("x"), heart.column("y")

    def written_into_hers() -> Any:
        mine = torch.zeros(*x.shape).send(westside)
        mine.copy_(x)
        return mine.get()

    def branch() -> Any:
        return "a patient over 65" if (x[0, 0] > 1).item() else "a younger one"

    return [
        ("a column", lambda: x.get()),
        ("one record, through a view", lambda: x[0].get()),
        ("the records, written into a tensor of hers", written_into_hers),
        ("a mean over all records", lambda: x.mean(0).get()),
        ("a branch on a record", branch),
        ("as many rows as there are patients", lambda: x[y == 1].shape),
        ("a record as an error's text", lambda: torch.zeros(1).send(westside)[(x[0, :1] * 1000).long()].get()),
        ("on to the other hospital", lambda: x.clone().move(grapevine)),
        ("a change of the hospital's records", lambda: x.zero_().sum().get()),
        ("a batch of a loader", lambda: next(iter(hc.FederatedDataLoader(heart, batch_size=1)))[0].get()),
    ]


def on_training(heart: Any, westside: Any) -> list[Attempt]:
    """Training, as she likes it."""
    x, y = heart.column("x"), heart.column("y")

    def by_pointers() -> Any:
        model = nn.Linear(len(COLUMNS), 1).send(westside)
        F.binary_cross_entropy_with_logits(model(x).squeeze(1), y).backward()
        return model.weight.grad.get()

    def by_an_unread_program() -> Any:
        return hc.record(lambda x: x[0], x)(x).get()

    def copied_into_a_model() -> Any:
        model = nn.Linear(len(COLUMNS), 1).send(westside)

        def copied(model: nn.Module, x: torch.Tensor) -> None:
            with torch.no_grad():
                model.weight.copy_(x[:1])

        hc.record(copied, model, x)(model, x)
        return model.get()

    return [
        ("a gradient, by pointers", by_pointers),
        ("a record, by a program that nobody has read", by_an_unread_program),
        ("a record, put into a model by such a program", copied_into_a_model),
    ]


def on_approval(heart: Any, westside: Any) -> Iterator[tuple[str, str]]:
    """More than was approved. The owner approves one training; the second request she denies."""
    model = nn.Linear(len(COLUMNS), 1)
    step = hc.record(training(model), model, heart)
    model.send(westside)
    step.submit(model, heart, reason="a regression").wait(timeout=600, every=0.2)
    step(model, heart)
    westside.session.wait()

    def again() -> Any:
        step(model, heart)
        westside.session.wait()

    def its_weight() -> Any:
        x, weight = heart.column("x"), model.weight.detach()
        return hc.record(lambda weight, x: x @ weight.t(), weight, x)(weight, x).get()

    yield "the same training once more", told(again)
    yield "the approved model, by pointers", told(lambda: (model.weight * 1).get())
    yield "each patient's risk, by the approved model", told(its_weight)
    second = step.submit(model, heart, reason="and the same again, improved")
    yield "a second request", told(lambda: second.wait(timeout=600, every=0.2)).replace(second.id, "ID")


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
