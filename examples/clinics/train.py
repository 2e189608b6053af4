"""The scientist's side: a model for two hospitals whose records she never sees.

    python train.py [--data FOLDER]             her side, and the owners answer in processes of their own
    python train.py --ask                       you answer for them, in other terminals: the commands are printed

She finds the tables by tag, tries to take a column and is refused, trains the same model at each hospital by a recorded
step, asks for both, waits, averages them at home (McMahan et al. 2017, one round), and tests on rows of her own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hospitals import hospitals
from table import COLUMNS, FILES, Table, split, table
from torch import nn
from torch.nn import functional as F

import housecall as hc
from housecall.errors import PolicyError
from housecall.worker.ledger import Account, Sealed

HERE = Path(__file__).parent
WHY = "two hospitals' models, averaged once: parameters of a logistic regression, no losses, no gradients"
EPOCHS = 8
BATCH = 64


class Story(NamedTuple):
    """What came of it."""

    refusal: str  # of a column
    refused_model: str  # before the owner approved
    accuracy: dict[str, float]  # on rows of her own, by model
    ledgers: dict[str, list[Sealed]]  # by hospital, verified


def train(model: nn.Module, heart: Any) -> torch.optim.Optimizer:
    """The article's loop, at one hospital. Its step is recorded, once for each size of batch: a run is one message."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(x).squeeze(1), y)
        loss.backward()
        optimizer.step()

    # Types are enough to record it: no record is touched, and it can be printed and read before anything runs.
    recorded = hc.record(step, torch.empty(BATCH, len(COLUMNS), device="meta"), torch.empty(BATCH, device="meta"))
    loader = hc.FederatedDataLoader(heart, batch_size=BATCH, shuffle=True)
    for _ in range(EPOCHS):
        for x, y in loader:
            recorded(x, y)
    return optimizer


def refused(get: Any) -> str:
    """What a refusal says. That it is one is the point."""
    try:
        get()
    except PolicyError as error:
        return str(error)
    raise AssertionError("this was to be refused, and was not")


def accuracy(model: nn.Module, rows: Table) -> float:
    """The share of rows that a model is right about."""
    x, y = rows
    with torch.no_grad():
        return float(((model(x).squeeze(1) > 0) == (y > 0)).float().mean())


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
    models, asked, refused_model = {}, {}, ""
    for hospital in cluster:
        model = models[hospital.id] = copy.deepcopy(start).send(hospital)
        optimizer = train(model, found[hospital.id])
        optimizer.zero_grad()  # gradients derive from the records as well, and were not asked for
        # It has seen this hospital's records now: it cannot come home, nor go to the other, unless the owner lets it.
        refused_model = refused(model.get)
        asked[hospital.id] = model.request(WHY)

    for name, answer in asked.items():
        answer.wait(timeout=600, every=0.2)
        models[name].get()
        print(f"{name}: approved, and home")

    models["average"] = average(list(models.values()), start)
    scores = {name: accuracy(model, rows) for name, model in {"untrained": start, **models}.items()}
    for name, score in scores.items():
        print(f"{name:>10}: right about {score:.1%} of {len(rows[1])} patients of her own")
    return Story(refusal, refused_model, scores, {hospital.id: ledger(hospital) for hospital in cluster})


def ledger(hospital: Any) -> list[Sealed]:
    """A hospital's ledger, verified, as its owner reads it: `housecall worker ledger [--verify] --folder ...`."""
    account = Account(hospital.folder)
    verified = account.verify()
    entries = list(account.entries())
    left = [sealed.entry for sealed in entries if sealed.entry.kind == "release"]
    print(f"\n{hospital.id}: the ledger is whole, {verified.entries} entries; what left:")
    for entry in left:
        print(f"  {' + '.join(entry.data_sets)} to {entry.principal}: {entry.program}")
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
