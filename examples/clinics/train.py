"""The scientist's side: a model for two hospitals whose records she never sees.

    python train.py [--data FOLDER]             her side, and the owners answer in processes of their own
    python train.py --ask                       you answer for them, in other terminals: the commands are printed

She finds the tables by tag, tries to take a column and is refused, writes her training on the hospitals' mocks, records
it, submits it to both owners, waits, runs it, averages the two models at home (McMahan et al. 2017, one round), tests
on rows of her own, and has each hospital score the mean on its patients, with noise.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hospitals import hospitals
from table import COLUMNS, FILES, Table, split, table
from torch import nn
from torch.nn import functional as F

import housecall as hc
from housecall.errors import HousecallError
from housecall.owner.ledger import Account, Sealed

HERE = Path(__file__).parent
WHY = "two hospitals' models, averaged once: 14 parameters of a logistic regression, no losses, no gradients"
STEPS = 24


class Story(NamedTuple):
    """What came of it."""

    refusal: str  # of a column
    refused_run: str  # before the owner approved
    program: hc.Program  # as it was submitted to westside
    rehearsal: tuple[float, float]  # the loss on a mock, before and after
    accuracy: dict[str, float]  # on rows of her own, by model
    scores: dict[str, float]  # the average's, on each hospital's records, with noise
    ledgers: dict[str, list[Sealed]]  # by hospital, verified


def training(model: nn.Module) -> Callable[[nn.Module, Table], None]:
    """The article's loop on all records at once. Nothing of it is picked by whoever runs it, but where it begins."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def train(model: nn.Module, records: Table) -> None:
        x, y = records
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x).squeeze(1), y).backward()
            optimizer.step()
        optimizer.zero_grad()  # gradients derive from the records as well, and nobody needs them

    return train


def rehearsed(start: nn.Module, mock: Any) -> tuple[float, float]:
    """The loss on a mock before and after training: that it runs is what she learns from it."""
    model, (x, y) = copy.deepcopy(start), mock[:]

    def loss() -> float:
        with torch.no_grad():
            return float(F.binary_cross_entropy_with_logits(model(x).squeeze(1), y))

    before = loss()
    training(model)(model, (x, y))
    return before, loss()


def refused(attempt: Any) -> str:
    """What a refusal says. That it is one is the point."""
    try:
        attempt()
    except HousecallError as error:
        return str(error).partition("\n")[0]
    raise AssertionError("this was to be refused, and was not")


def right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The share of rows that a model is right about: of one, 0 or 1."""
    return ((model(x).squeeze(1) > 0) == (y > 0)).float().mean()


def accuracy(model: nn.Module, rows: Table) -> float:
    """The same, here."""
    with torch.no_grad():
        return float(right(model, *rows))


def scored(model: nn.Module, found: dict[str, Any]) -> dict[str, float]:
    """The same, by each hospital's own loop, on its own records: a mean with noise."""
    scores = {}
    for name, heart in found.items():
        score = heart.evaluate(right, model, "x", "y", bounds=(0, 1))
        scores[name] = float(score.value)
        noise = 2**0.5 * score.scale  # the standard deviation of a Laplace distribution
        print(
            f"{name:>10}: right about {score.value:.1%} of its {heart.count} patients, give or take {noise:.1%}, for "
            f"epsilon {score.epsilon:.2f} of each; {score.left:.2f} is left"
        )
    return scores


def average(models: list[nn.Module], like: nn.Module) -> nn.Module:
    """A model whose parameters are the means of theirs."""
    mean = copy.deepcopy(like)
    with torch.no_grad():
        for parameter, *others in zip(mean.parameters(), *(one.parameters() for one in models), strict=True):
            parameter.copy_(torch.stack([other.detach() for other in others]).mean(0))
    return mean


def story(cluster: hc.LocalCluster, rows: Table) -> Story:
    """Her part, from the search to the figure."""
    found = {hospital.id: hospital.search("#heart")[0] for hospital in cluster}
    for heart in found.values():
        print(heart)

    refusal = refused(lambda: found["westside"].column("x").get())
    print(f"\nA column, please?  {refusal}\n")

    start = nn.Linear(len(COLUMNS), 1)
    mock = found["westside"].mock()
    losses = rehearsed(start, mock)
    print(f"{mock}\nthe loss on it: {losses[0]:.2f}, and {losses[1]:.2f} after training\n")

    runs, asked, models, refused_run = {}, {}, {}, ""
    for hospital in cluster:
        heart, model = found[hospital.id], copy.deepcopy(start)
        step = runs[hospital.id] = hc.record(training(model), model, mock)
        models[hospital.id] = model.send(hospital)
        refused_run = refused(lambda step=step, given=(model, heart), at=hospital: (step(*given), at.session.wait()))
        asked[hospital.id] = step.submit(model, heart, reason=WHY)
    program = runs["westside"].program
    print(f"her program, of {len(program.calls)} operations, is submitted to both\n")

    for name, answer in asked.items():
        answer.wait(timeout=600, every=0.2)
        runs[name](models[name], found[name])  # one message: it runs there, once, as it was read
        models[name].get()
        print(f"{name}: approved, run, and home")

    models["average"] = average(list(models.values()), start)
    scores = {name: accuracy(model, rows) for name, model in {"untrained": start, **models}.items()}
    for name, score in scores.items():
        print(f"{name:>10}: right about {score:.1%} of {len(rows[1])} patients of her own")
    theirs = scored(models["average"], found)
    ledgers = {hospital.id: ledger(hospital) for hospital in cluster}
    return Story(refusal, refused_run, program, losses, scores, theirs, ledgers)


def ledger(hospital: Any) -> list[Sealed]:
    """A hospital's ledger, verified, as its owner reads it: `housecall worker ledger [--verify] --folder ...`."""
    account = Account(hospital.folder)
    verified = account.verify()
    entries = list(account.entries())
    left = [sealed.entry for sealed in entries if sealed.entry.kind == "release"]
    print(f"\n{hospital.id}: the ledger is whole, {verified.entries} entries; what left:")
    for entry in left:
        print(f"  {' + '.join(entry.data_sets)} to {entry.principal}: {entry.decision}\n    by program {entry.program}")
    return entries


@contextlib.contextmanager
def owners(cluster: hc.LocalCluster, *answer: str) -> Iterator[None]:
    """The owners, each in a process of her own."""
    path = os.pathsep.join(entry for entry in sys.path if entry)  # the package, wherever this process has it from
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "owner.py"), str(hospital.folder), *answer],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
        )
        for hospital in cluster
    ]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def public_rows(data: Path | None) -> Table:
    """Rows that were published, of both hospitals: hers."""
    parts = [split(table(name, data))[1] for name in FILES]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def main() -> None:
    """The whole story, on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given = os.environ.get("HEART_DISEASE")
    parser.add_argument("--data", type=Path, default=Path(given) if given else None, help="a folder: see table.py")
    parser.add_argument("--ask", action="store_true", help="you are the owners")
    options = parser.parse_args()
    torch.manual_seed(0)
    hc.TorchHook(torch)
    with hospitals(options.data) as cluster:
        if options.ask:
            for hospital in cluster:
                print(f"In another terminal: python owner.py {hospital.folder}")
            story(cluster, public_rows(options.data))
        else:
            with owners(cluster, "--answer", "approve"):
                story(cluster, public_rows(options.data))


if __name__ == "__main__":
    main()
