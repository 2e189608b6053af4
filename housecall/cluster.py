"""`LocalCluster`: worker processes on this machine, over the same mutual TLS as anywhere else.

Everything is real and short-lived: an authority, a certificate for each worker and for the caller, a process for
each worker, in a temporary folder that goes with the cluster.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import torch

from .errors import UsageError, WorkerGone
from .host.config import Config
from .identity.authority import Authority
from .identity.certificate import Identity
from .owned.catalogue import Catalogue
from .owned.description import check_unit, check_words
from .owned.mocks import Fakes
from .owner.policies import POLICY_FOLDER, draft, sign
from .owner.policy import Policy
from .owner.signing import OwnerKey
from .remote import RemoteWorker, reach
from .sandbox.environment import born_clean
from .types import Unit

__all__ = ["ClusterWorker", "LocalCluster"]

START_S = 60.0
PREFIX, OWNER = "housecall-cluster-", "owner.lock"  # a cluster's folder, and the file that its process holds locked


def _hold(folder: Path) -> int:
    """Say, for as long as this process lives, that the cluster of a folder does."""
    draft = folder / f".{OWNER}"
    handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    draft.rename(folder / OWNER)  # it is locked from when it is there
    return handle


def _sweep(place: Path) -> None:
    """Remove what clusters left whose processes were killed: this user's own folders, with a lock that nobody holds."""
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
                continue
            handle = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its process lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


class ClusterWorker(RemoteWorker):
    """A worker of a `LocalCluster`. `pid` is its process."""

    def __init__(self, pid: int, folder: Path, address: str, identity: Identity, **options: Any) -> None:
        url = f"grpcs://{address}"
        super().__init__(reach(url, identity), url, **options)
        self.pid = pid
        self.folder = folder

    def add(
        self,
        name: str,
        /,
        *,
        tags: Sequence[str] = (),
        description: str = "",
        mock: Mapping[str, torch.Tensor] | Fakes | None = None,
        unit: Unit = "record",
        person: str = "",
        policy: Policy | None = None,
        replace: bool = False,
        **columns: torch.Tensor,
    ) -> None:
        """Register a data set, as the worker's owner would: see `VirtualWorker.add`. Its policy is signed with the key
        in the worker's folder, and without one nobody may use it."""
        check_words(
            tags=tags, description=description, mock=mock, unit=unit, person=person, policy=policy, replace=replace
        )
        options: Any = {"mock": mock, "unit": unit, "person": person}
        if policy is not None:
            check_unit(Catalogue().register(name, columns, tags, description, **options), policy)
        Catalogue(self.folder).add(name, columns, tags, description, replace=replace, **options)
        if policy is not None:
            key = OwnerKey.load(self.folder)
            file = self.folder / POLICY_FOLDER / f"{name}.toml"
            file.parent.mkdir(mode=0o700, exist_ok=True)
            file.write_text(policy.text())
            sign(self.folder, draft(self.folder, name, key.public), key)

    def remove(self, name: str) -> None:
        """Remove a data set, as the worker's owner would: see `VirtualWorker.remove`. Its policy stays in the worker's
        folder, and permits nothing until it is signed for other data."""
        Catalogue(self.folder).remove(name)

    def __repr__(self) -> str:
        return f"<ClusterWorker id:{self.id} pid:{self.pid} at {self.address}>"


class LocalCluster:
    """Worker processes on this machine: `with LocalCluster(2) as (westside, grapevine): ...`.

    `workers` is a number, or their names. `threads` is how many each computes with: by default they share the cores
    equally, since two that compete for one lose much more than half. `settings` are keys of `worker.toml`
    (`lease_s=5`, `limits={"slots": 100}`). The processes end with the `with` block, or with this process."""

    def __init__(
        self,
        workers: int | Sequence[str] = 2,
        *,
        threads: int | None = None,
        synchronous: bool = False,
        patience: float = 10.0,
        **settings: Any,
    ) -> None:
        names = [f"worker-{number}" for number in range(1, workers + 1)] if isinstance(workers, int) else list(workers)
        if not names or len(set(names)) != len(names):
            raise UsageError(f"a cluster needs at least one worker, each with a name of its own; found {workers!r}")
        cores = len(os.sched_getaffinity(0))
        _sweep(Path(tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = _hold(self.folder)
        self.workers: tuple[ClusterWorker, ...] = ()
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            authority = Authority.create(self.folder / "authority", "local-cluster")
            self.identity = authority.identity("me", "scientist", ())
            settings = {"threads": threads or max(1, cores // len(names)), **settings}
            for name in names:
                self._prepare(authority, name, settings)
            self._processes = [self._started(name, int(settings["threads"])) for name in names]
            addresses = [self._address(process) for process in self._processes]
            self.workers = tuple(
                ClusterWorker(
                    process.pid, self.folder / name, address, self.identity, synchronous=synchronous, patience=patience
                )
                for process, name, address in zip(self._processes, names, addresses, strict=True)
            )
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[ClusterWorker]:
        return iter(self.workers)

    def __len__(self) -> int:
        return len(self.workers)

    def __getitem__(self, at: int | str) -> ClusterWorker:
        """A worker by number or name."""
        for number, worker in enumerate(self.workers):
            if at in (number, worker.id):
                return worker
        raise KeyError(f"no worker {at!r}; there are {', '.join(worker.id for worker in self.workers)}")

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, name: str) -> str:
        """What a worker's process has logged so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        """End the sessions, drain the processes, remove the folder. Harmless when done already."""
        for worker in self.workers:
            with contextlib.suppress(WorkerGone):
                worker.close()
        self.workers = ()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._processes = []
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _prepare(self, authority: Authority, name: str, settings: dict[str, Any]) -> None:
        folder = self.folder / name
        Config.create(folder, name, "127.0.0.1:0")
        text = msgspec.toml.encode({"name": name, "listen": "127.0.0.1:0", **settings}).decode()
        Config.parse(text, "LocalCluster")
        (folder / "worker.toml").write_text(text)
        OwnerKey.create(folder)
        authority.identity(name, "worker", ("127.0.0.1", "localhost")).save(folder / "identity")

    def _started(self, name: str, threads: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "housecall.service", str(self.folder / name), "--parent", str(os.getpid())]
        quiet = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(  # noqa: S603  # this package, in words of its own
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                env=born_clean({**os.environ, **quiet}),
                start_new_session=True,  # a terminal's Ctrl-C is for the caller, who then ends her workers
            )

    def _address(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        started = time.monotonic()
        while not select.select([process.stdout], [], [], 0.1)[0]:
            if process.poll() is not None or time.monotonic() - started > START_S:
                break
        line = process.stdout.readline() if process.poll() is None else b""
        if not line:
            logs = "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))
            raise WorkerGone(f"a worker of the cluster did not start within {START_S:g} s:\n{logs}")
        address: str = json.loads(line)["address"]
        return address
