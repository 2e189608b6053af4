"""A worker that runs: from its folder to a listening process, and to its end.

    folder/worker.toml   what its owner decided          folder/identity/   key, certificate, authority, revocations
    folder/data/         the owned data                  folder/status.json what it says of itself, each second

`housecall worker up` runs one in the foreground, `LocalCluster` some in the background; `python -m housecall.service
FOLDER` is what both start. SIGTERM and Ctrl-C drain it: no new sessions, what has come is done and answered.
Its process enters the sandbox first (`confine`), and starts itself anew for that if it was not born clean.

NOTE [Told twice]
Whoever says it a second time does not want to wait. But a process that has a parent may be told twice of one thing:
systemd sends SIGTERM to every process of a unit, and the parent passes on its own. So there only SIGINT is a second
time, and the parent sends that if it is told twice itself (`supervise`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__
from .errors import HousecallError, IdentityError
from .host.config import DATA_FOLDER, Config, host_and_port
from .host.host import Host
from .host.lock import hold, let_go
from .host.seat import Standing
from .identity.certificate import FILE, Principal, principal, server_credentials, utc_now
from .identity.enrolment import authority_url
from .identity.keeper import Keeper
from .identity.names import target
from .identity.revocation import Revocations, watch
from .logs import write_logs
from .owned.catalogue import Catalogue
from .owned.description import unit_trouble
from .owner.approvals import REQUEST_FOLDERS
from .owner.files import make_folder
from .owner.journal import LEDGER_FOLDER
from .owner.policies import POLICY_FOLDER
from .owner.policy import DENY
from .owner.signing import KEY_FILE, PUBLIC_FILE
from .sandbox.environment import begin_again
from .sandbox.limits import most_memory_mb
from .sandbox.process import Needs, enter
from .sandbox.report import Report
from .transport.grpc import Address, Listener, is_loopback
from .worker.gate import Gate
from .worker.limits import Limits
from .worker.owner import gate_of
from .worker.statistics import budgets
from .worker.worker import Worker

__all__ = ["STATUS_FILE", "Service", "confine", "main", "run"]

STATUS_FILE = "status.json"
TEMPORARY_FOLDER = "tmp"
GRACE_S = 2.0  # for the streams, once the sessions have ended
USAGE = 2  # the status of a process that ended with a message for its owner

log = logging.getLogger(__name__)


class Service:
    """A worker of a folder, listening from the moment it is made.

    `listen` stands in for the folder's own address ("HOST:PORT", port 0 for any); `plaintext` serves without TLS to
    anyone who can connect, `anonymous` by name: only on this machine, unless `plaintext` is said of another address
    on purpose. For the status: `sandbox` is what `confine` gave, `restarts` how often its process was started anew, and
    `died` how the last one ended. Raises `UsageError` or `IdentityError` for a folder that cannot be served."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        listen: str = "",
        plaintext: bool = False,
        sandbox: Report | None = None,
        restarts: int = 0,
        died: str = "",
    ) -> None:
        self.folder = Path(folder)
        self.sandbox = sandbox
        self.restarts, self.died = restarts, died
        self.ended = False  # whether nothing runs any more
        self._keeper: Keeper | None = None
        self._let_go = False
        self._unwritten = self._unnoticed = ""  # why the status, and the ledger, could not be written last time
        self.config = config = Config.load(self.folder)
        self.threads = config.threads or max(1, len(os.sched_getaffinity(0)))
        self._lock = hold(self.folder)
        try:
            self._begin(listen, plaintext)
        except BaseException:
            let_go(self._lock)
            raise

    def _begin(self, listen: str, plaintext: bool) -> None:
        config = self.config
        self.catalogue = Catalogue(self.folder)
        self.started = time.time()
        self._closing, self._closed = threading.Event(), threading.Event()
        where = Address(*_listening_at(listen, config), secure=not plaintext)
        torch.set_num_threads(self.threads)
        self.host = Host(
            Worker(
                config.name, _limits(config), catalogue=self.catalogue, gate=_gate(self.folder), device=config.device
            ),
            threads=self.threads,
            lease_s=config.lease_s,
            frame_bytes=config.limits.frame_mb * 1_000_000,
            inbox_bytes=config.limits.inbox_mb * 1_000_000,
            seats_each=config.limits.sessions,
        )
        try:
            self._say_units()
            self._listener = self._listening(where)
        except BaseException:
            self._closing.set()
            self._closed.set()
            self.host.close()
            raise

    def _say_units(self) -> None:
        """Say in the log which budgets pay for nothing, since their data protects another unit."""
        policies = self.host.worker.gate.policies
        for owned in self.catalogue.search():
            if trouble := unit_trouble(owned, policies.get(owned.name, DENY)):
                log.warning("%s", trouble)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._listener.address

    def _listening(self, where: Address) -> Listener:
        if not where.secure:
            if not is_loopback(where.host):
                log.warning("serving %s in plain text: whoever reaches it sees and may do everything", where)
            return Listener(where, self.host.serve, None, lambda context: "anonymous")
        keys = self.config.keys(self.folder)
        if not (keys / FILE).exists():
            raise IdentityError(f"no {FILE} in {keys}: `housecall ca join INVITATION --out {keys}` makes one")
        keeper = self._keeper = Keeper(keys, url=self.config.identity.ca_url)
        lists = [Revocations(path, keeper.current().ca) for path in self.config.revocation_lists(self.folder)]
        for name, run, args in (
            ("keeper", keeper.run, (self._closing,)),
            ("revocations", watch, (lists, self._closed)),
        ):
            threading.Thread(target=run, args=args, name=f"housecall-{name}", daemon=True).start()

        def standing(who: Principal) -> Standing:
            if any(one.revoked(who.serial) for one in lists):
                return "revoked"
            return "good" if utc_now() < who.not_after else "ended"

        def identified(context: Any) -> Principal:
            try:
                return principal(context, utc_now())
            except IdentityError as error:
                raise PermissionError(str(error)) from None

        self.host.standing = standing
        return Listener(where, self.host.serve, server_credentials(keeper.current), identified)

    def status(self) -> dict[str, Any]:
        """What it says of itself: no values, no names of values."""
        seats = self.host.seats
        return {
            "worker": self.config.name,
            "version": __version__,
            "pid": os.getpid(),
            "address": str(self.address),
            "tls": self.address.secure,
            "started": self.started,
            "restarts": self.restarts,
            "died": self.died,
            "certificate": self._certificate(),
            "now": time.time(),
            "threads": self.threads,
            "device": self.config.device,
            "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "sessions": [
                {
                    "principal": seat.principal,
                    "connected": seat.stream != 0,
                    "slots": len(seat.door.store),
                    "mb": round(seat.door.store.held / 1e6, 1),
                    "frames": seat.line.received,
                    "waiting": len(seat.inbox),
                }
                for seat in seats
            ],
            "busy_s": round(self.host.turns.busy_s, 3),
            "counters": dict(self.host.counters),
            "budgets": self._budgets(),
            "sandbox": [one._asdict() for one in self.sandbox.protections] if self.sandbox is not None else [],
        }

    def _budgets(self) -> dict[str, str]:
        """What is spent of each data set's budget; nothing if the ledger cannot be read, which other lines say."""
        worker = self.host.worker
        try:
            return budgets(worker.catalogue, worker.gate)
        except HousecallError as error:
            return {"all": f"unknown: {error}"}

    def _certificate(self) -> dict[str, Any] | None:
        """How its certificate stands: a worker whose authority cannot be reached says so while there is time."""
        if self._keeper is None:
            return None
        shown = self._keeper.current()
        return {
            "until": shown.not_after.timestamp(),
            "renews": shown.renews_at.timestamp(),
            "authority": self._keeper.authority,
            "trouble": self._keeper.trouble,
        }

    def notice(self) -> None:
        """Have what the owner answered, in a process of her own, in the ledger. That it cannot be written is a line in
        the log, once: nothing leaves meanwhile in any case."""
        try:
            self.host.worker.gate.notice()
        except (HousecallError, OSError) as error:
            if self._unnoticed != str(error):
                log.error("the owner's answers are not in the ledger: %s", error)
            self._unnoticed = str(error)

    def write_status(self) -> None:
        """`status.json`, whole at every moment. A disk that is full is a line in the log, once, and no end."""
        path = self.folder / STATUS_FILE
        beside = path.with_suffix(".new")
        try:
            beside.write_text(json.dumps(self.status(), indent=1))
            beside.replace(path)
        except OSError as error:
            if self._unwritten != str(error):
                log.error("%s cannot be written, so `worker status` shows what was: %s", path, error)
            self._unwritten = str(error)
        else:
            self._unwritten = ""

    def close(self, drain_s: float | None = None) -> bool:
        """Drain for up to so many seconds (as worker.toml says, if left out) and end; whether all that had come was
        done. `ended` says whether the last operation has ended too: one that runs cannot be stopped."""
        self._closing.set()
        done = self.host.drain(self.config.drain_s if drain_s is None else drain_s)
        self.ended = self.host.turns.close(0)
        self._listener.close(grace=GRACE_S)
        self._closed.set()  # until here, who is revoked was cut
        with contextlib.suppress(OSError):
            (self.folder / STATUS_FILE).unlink()
        ledger = self.host.worker.gate.ledger
        if ledger is not None and self.ended:
            with contextlib.suppress(HousecallError, OSError):  # what was only counted; it has been said that it fails
                self.host.worker.gate.settle(everything=True)
            ledger.close()
        if not self._let_go:
            self._let_go = True
            let_go(self._lock)
        return done


def _beside(name: str, work: Callable[..., None], *args: Any) -> None:
    """Have something done on a thread of its own."""
    threading.Thread(target=work, args=args, name=f"housecall-{name}", daemon=True).start()


def _gate(folder: Path) -> Gate:
    """What the owner signed in the folder; one without an owner's key denies everything."""
    if not (folder / PUBLIC_FILE).exists():
        log.warning("no owner's key in %s: nothing of its data may be used (`housecall worker init` makes one)", folder)
        return Gate()
    return gate_of(folder)


def _limits(config: Config) -> Limits:
    """The limits of worker.toml, in the worker's own units."""
    given = config.limits
    return Limits(
        session_bytes=given.session_mb * 1_000_000,
        slots=given.slots,
        call_bytes=given.call_mb * 1_000_000,
        call_flops=given.call_gflop * 1_000_000_000,
        compute_s=given.compute_s,
        reply_bytes=given.frame_mb * 1_000_000,
    )


def _listening_at(listen: str, config: Config) -> tuple[str, int]:
    """Host and port, of the option if it is given, else of worker.toml."""
    return host_and_port(listen, "--listen") if listen else host_and_port(config.listen, "listen")


def _authority(config: Config, keys: Path) -> str:
    """Where the authority is (HOST:PORT), "" if nobody says."""
    return target(config.identity.ca_url) if config.identity.ca_url else authority_url(keys)


def confine(folder: Path, *, listen: str = "", plaintext: bool = False, ports: tuple[int, ...] = ()) -> Report:
    """Have this process, for good, do no more than the worker of `folder` needs; `ports`: where else it listens.

    Called before data is read and before there are threads. What is not to be had is a warning in the log, or with
    `strict = true` a `UsageError`."""
    folder = folder.resolve()
    config = Config.load(folder)
    keys = config.keys(folder)
    for name in (DATA_FOLDER, LEDGER_FOLDER, POLICY_FOLDER, *REQUEST_FOLDERS, TEMPORARY_FOLDER):
        make_folder(folder / name)  # what is made later, next to a secret, could not be read
    tempfile.tempdir = str(folder / TEMPORARY_FOLDER)  # torch wants one
    places = {path.parent for path in config.revocation_lists(folder)} - {keys}
    report = enter(
        Needs(
            folder,
            writes=(keys,),
            reads=tuple(sorted(place for place in places if not place.is_relative_to(folder))),
            secrets=(folder / KEY_FILE,),
            ports=(_listening_at(listen, config)[1], *ports),
            authority="" if plaintext else _authority(config, keys),
            memory_mb=_memory_mb(config),
            network=config.sandbox.network == "listen",
            cuda=config.device.startswith("cuda"),
        )
    )
    report.log(log)
    if config.sandbox.strict:
        report.demand()
    return report


def _memory_mb(config: Config) -> int:
    """What the process may allocate, in 10^6 bytes; 0 for no bound."""
    if isinstance(config.sandbox.memory_mb, int):
        return config.sandbox.memory_mb
    return 0 if config.device.startswith("cuda") else most_memory_mb()


def run(service: Service, announce: Callable[[str], None], *, parent: int = 0) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain. With `parent`, also until that process is gone.

    If an operation is still under way when that has taken its time, or it is told once more meanwhile, the process ends
    here and now, with status 1."""
    stop, again = threading.Event(), threading.Event()

    def told(number: int, frame: object) -> None:
        if stop.is_set() and (number == signal.SIGINT or not parent):  # see NOTE [Told twice]
            again.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    service.write_status()
    announce(json.dumps({"worker": service.config.name, "address": str(service.address), "pid": os.getpid()}))
    while not stop.wait(1.0):
        service.write_status()
        service.notice()
        if parent and os.getppid() != parent:
            break
    log.info(
        "draining: what has come is done and answered, for up to %g s; told once more to end, it does so at once",
        service.config.drain_s,
    )
    _beside("again", _end_if_told, service, again)
    service.close()
    if not service.ended:
        log.error("an operation is under way and cannot be stopped: the process ends without it")
        _end_now()


def _end_if_told(service: Service, again: threading.Event) -> None:
    """Not in the signal's handler, which may stand in the middle of a line of the log."""
    again.wait()
    waiting = sum(len(seat.inbox) for seat in service.host.seats)
    log.error("told once more to end: the process ends now; of what had come, %d frames wait and are not done", waiting)
    with contextlib.suppress(OSError):
        (service.folder / STATUS_FILE).unlink()
    _end_now()


def _end_now() -> NoReturn:
    logging.shutdown()
    os._exit(1)


def keep_memory() -> None:
    """Let glibc keep freed pages: training frees and takes the same megabytes each batch, and fetching them anew from
    the system costs up to a tenth of a CNN's batch. Elsewhere than on glibc nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)
        mallopt(arena_max, 1)


def main(arguments: list[str] | None = None) -> int:
    """Run the worker of a folder; one line of JSON on standard output says when it listens and where."""
    parser = argparse.ArgumentParser(prog="python -m housecall.service", description=main.__doc__)
    parser.add_argument("folder")
    parser.add_argument("--listen", default="", help="HOST:PORT instead of the folder's; port 0 for any")
    parser.add_argument("--plaintext", action="store_true", help="without TLS")
    parser.add_argument("--restarts", type=int, default=0, help="how often it was started anew, for the status")
    parser.add_argument("--died", default="", help="how the one before it ended, for the status")
    parser.add_argument("--parent", type=int, default=0, help="end when this process is no longer the parent")
    given = parser.parse_args(arguments)
    begin_again()
    write_logs()
    keep_memory()
    folder = Path(given.folder).resolve()
    try:
        sandbox = confine(folder, listen=given.listen, plaintext=given.plaintext)
        service = Service(
            folder,
            listen=given.listen,
            plaintext=given.plaintext,
            sandbox=sandbox,
            restarts=given.restarts,
            died=given.died,
        )
    except (HousecallError, OSError) as error:
        sys.stderr.write(f"housecall: {error}\n")
        return USAGE

    def announce(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    run(service, announce, parent=given.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
