"""What `housecall demo` runs, shows and leaves behind. Only this command imports it, since it imports torch."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn

from .. import __version__
from ..cluster import ClusterWorker, LocalCluster
from ..datasets import MNIST, Compose, Normalize, ToTensor
from ..errors import HousecallError
from ..pointers.data import FederatedDataLoader, FederatedDataset, federate
from ..pointers.hook import TorchHook
from ..pointers.location import Location
from ..pointers.module import location_of
from ..virtual import VirtualWorker

__all__ = ["Net", "Run", "Settings", "Show", "run", "settle"]

TARGET = 0.985
LOG_INTERVAL = 10  # batches between two looks at the loss, as in the article


class Net(nn.Module):
    """The article's network: two convolutions and two linear layers, 1.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, 28, 28) images -> (n, 10) log-probabilities."""
        x = F.max_pool2d(self.conv(x), 2)
        return F.log_softmax(self.fc(x.view(-1, 64 * 12 * 12)), dim=1)


@dataclass(frozen=True)
class Settings:
    """What the options of `housecall demo` say."""

    data: Path
    epochs: int
    lr: float
    momentum: float
    batch_size: int
    seed: int
    owners: bool
    limit: int | None
    processes: bool = False
    decay: bool = True


@dataclass
class Run:
    """One run of the demo: what happened, and the best model so far."""

    settings: Settings
    schools: dict[str, int]
    losses: list[tuple[int, float]] = field(default_factory=list)  # (images seen, loss of a batch)
    tests: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    accuracy: float = 0.0
    train_seconds: float = 0.0
    data_bytes: int = 0
    model_bytes_sent: int = 0
    model_bytes_fetched: int = 0
    visits: int = 0
    waits: int = 0
    interrupted: bool = False
    trouble: str = ""  # what else ended it


class Show:
    """The live display: epoch, batch, loss, where the model is now, accuracy."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} at [bold]{task.fields[place]}[/], test {task.fields[accuracy]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self.task = self.progress.add_task("train", total=None, epoch="-", loss="-", place="home", accuracy="-")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False)

    def update(self, **fields: Any) -> None:
        """Change what the line shows."""
        self.progress.update(self.task, **fields)


def run(settings: Settings, show: Show) -> Run:
    """Load the data, give each school its part, train, and test after each school. Ctrl-C ends it early, with the
    best model so far."""
    torch.manual_seed(settings.seed)
    hook = TorchHook(torch)
    try:
        with _schools(settings) as schools:
            return _taught(settings, schools, show)
    finally:
        hook.remove()


@contextmanager
def _schools(settings: Settings) -> Iterator[Sequence[Location]]:
    """The two schools: in this process, or each in one of its own."""
    names = "westside", "grapevine"
    if settings.processes:
        with LocalCluster(names) as cluster:
            yield cluster.workers
    else:
        yield tuple(VirtualWorker(id=name) for name in names)


def _taught(settings: Settings, schools: Sequence[Location], show: Show) -> Run:
    for school in schools:
        if isinstance(school, ClusterWorker):
            show.say(f"  {school.id} is process {school.pid}, at {school.address}")
    show.say("Reading MNIST ...")
    federated, test_set = _deal(settings, schools)
    result = Run(settings, {part.location.id: len(part) for part in federated.parts})
    result.data_bytes = sum(school.session.bytes_sent for school in schools)
    for part in federated.parts:
        show.say(f"  {part.location.id} holds {len(part):,} images")
    with show.progress:
        _train(result, federated, test_set, show)
    result.model_bytes_sent = sum(school.session.bytes_sent for school in schools) - result.data_bytes
    result.model_bytes_fetched = sum(school.session.bytes_fetched for school in schools)
    result.waits = sum(school.session.waits for school in schools)
    return result


def _deal(
    settings: Settings, schools: Sequence[Location]
) -> tuple[FederatedDataset, tuple[torch.Tensor, torch.Tensor]]:
    """Each school its images, and the test set at home: ((n, 1, 28, 28) images, (n,) labels)."""
    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    train = MNIST(settings.data, train=True, download=True, transform=transform)
    test = MNIST(settings.data, train=False, download=True, transform=transform)
    count = min(settings.limit or len(train), len(train))
    if settings.owners:
        owners = train.owners()
        parts = [[index for index in owners[name] if index < count] for name in ("students", "clerks")]
    else:
        parts = [list(range(count // 2)), list(range(count // 2, count))]
    federated = federate(train, schools, parts)
    for school in schools:
        school.session.wait()
    images = torch.stack([image for image, _ in test.__getitems__(list(range(len(test))))])
    return federated, (images, test.targets)


def _train(result: Run, federated: FederatedDataset, test_set: tuple[torch.Tensor, torch.Tensor], show: Show) -> None:
    """The article's loop. If Ctrl-C or an error ends it, the best model so far is kept."""
    model: Any = Net()
    try:
        _epochs(result, model, federated, test_set, show)
    except KeyboardInterrupt:
        result.interrupted = True
        show.say("Ctrl-C: bringing the model home ...")
        _last_model(result, model, test_set, show)
    except HousecallError as error:
        result.trouble = str(error)
        show.say(f"[red]{error}[/]")
        _last_model(result, model, test_set, show)


def _last_model(result: Run, model: Any, test_set: tuple[torch.Tensor, torch.Tensor], show: Show) -> None:
    """Keep the model as it is, tested, if none was kept so far; another Ctrl-C skips the test."""
    with suppress(HousecallError):
        if location_of(model) is not None:
            model.get()
    if result.best or location_of(model) is not None:
        return
    result.best = {name: value.detach().clone() for name, value in model.state_dict().items()}
    show.say("Testing it; Ctrl-C once more skips that ...")
    with suppress(KeyboardInterrupt):
        _test(result, model, test_set, 1, "the end", 0, show)


def _epochs(
    result: Run, model: Any, federated: FederatedDataset, test_set: tuple[torch.Tensor, torch.Tensor], show: Show
) -> None:
    settings = result.settings
    loader = FederatedDataLoader(federated, batch_size=settings.batch_size, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
    steps = len(loader) * settings.epochs
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - settings.decay * step / steps)
    show.progress.update(show.task, total=steps)
    seen = 0
    for epoch in range(1, settings.epochs + 1):
        show.update(epoch=f"{epoch}/{settings.epochs}")
        here = federated.workers[0]
        for batch, (data, target) in enumerate(loader):
            if data.location is not here:
                _test(result, model, test_set, epoch, here.id, seen, show)
            here = data.location
            started = time.perf_counter()
            show.update(place=here.id)
            model.send(data.location)
            optimizer.zero_grad()
            loss: Any = F.nll_loss(model(data), target)
            loss.backward()
            optimizer.step()
            model.get()
            falling.step()
            result.visits += 1
            seen += len(data)
            if batch % LOG_INTERVAL == 0:
                result.losses.append((seen, loss.get().item()))
                show.update(loss=f"{result.losses[-1][1]:.3f}")
            result.train_seconds += time.perf_counter() - started
            show.progress.advance(show.task)
        _test(result, model, test_set, epoch, here.id, seen, show)


@torch.no_grad()
def _test(
    result: Run,
    model: Any,
    test_set: tuple[torch.Tensor, torch.Tensor],
    epoch: int,
    place: str,
    seen: int,
    show: Show,
) -> None:
    """Test at home, on images that no school has; keep the model if it is the best so far."""
    show.update(place="home")
    model.eval()
    images, labels = test_set
    outputs = torch.cat([model(images[start : start + 1000]) for start in range(0, len(images), 1000)])
    model.train()
    accuracy = (outputs.argmax(1) == labels).float().mean().item()
    loss = F.nll_loss(outputs, labels).item()
    result.tests.append({"epoch": epoch, "after": place, "images_seen": seen, "loss": loss, "accuracy": accuracy})
    if accuracy >= result.accuracy:
        result.accuracy = accuracy
        result.best = {name: value.detach().clone() for name, value in model.state_dict().items()}
    show.update(accuracy=f"{accuracy:.2%}")
    show.say(f"  epoch {epoch}, after {place}: test accuracy {accuracy:.2%}, loss {loss:.4f}")


def settle(result: Run, folder: Path) -> None:
    """Write what the run leaves behind, and say what happened."""
    console = Console()
    if result.best:
        save_file(result.best, folder / "model.safetensors")
    (folder / "run.json").write_text(json.dumps(_record(result), indent=2) + "\n")
    if result.losses or result.tests:
        _plot(result, folder / "curve.png")
    console.print(_closing(result, folder), highlight=False, soft_wrap=True)


def _record(result: Run) -> dict[str, Any]:
    record = {key: value for key, value in asdict(result).items() if key != "best"}
    record["settings"]["data"] = str(result.settings.data)
    record["machine"] = {
        "housecall": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    return record


def _plot(result: Run, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    if result.losses:
        left.plot(*zip(*result.losses, strict=True), color="#4878a8", linewidth=0.8)
    left.set(xlabel="images seen", ylabel="loss of a batch", yscale="log", title="training")
    seen = [test["images_seen"] for test in result.tests]
    right.plot(seen, [100 * test["accuracy"] for test in result.tests], "o-", color="#4878a8")
    right.axhline(100 * TARGET, color="#b0b0b0", linewidth=0.8)
    for test in result.tests:
        right.annotate(test["after"], (test["images_seen"], 100 * test["accuracy"]), fontsize=8, va="bottom")
    right.set(xlabel="images seen", ylabel="test accuracy, %", title="10,000 images that no school has")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _closing(result: Run, folder: Path) -> str:
    held = " and ".join(f"{count:,} images at {name}" for name, count in result.schools.items())
    millions = 1e6
    visits = max(result.visits, 1)
    placed = result.data_bytes / millions
    out, back = result.model_bytes_sent / visits / millions, result.model_bytes_fetched / visits / millions
    early = "Stopped early; the best model so far is kept.\n" if result.interrupted or result.trouble else ""
    return (
        f"\n{early}[bold]Test accuracy {result.accuracy:.2%}[/] after {result.train_seconds:.0f} s of training.\n\n"
        f"What each school held   {held}.\n"
        f"What travelled          the model, {result.visits:,} visits: {out:.1f} MB there, {back:.1f} MB back each,\n"
        f"                        and {len(result.losses):,} loss values.\n"
        f"What did not            images and labels. {placed:.0f} MB were placed at the schools beforehand,\n"
        "                        in place of what real schools hold already.\n"
        "What this does not show the schools see the model, gradients tell of the images, and both schools are on\n"
        "                        this machine and are asked for nothing.\n\n"
        f"{folder}/model.safetensors  {folder}/run.json  {folder}/curve.png"
    )
