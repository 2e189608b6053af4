"""`enter`: this process becomes one that may compute for strangers. What it needs from then on is a `Needs`.

What must live here: which files, ports and rights a worker's process needs, and the order in which the rest is given
up. What must not: how the kernel is told. Call `enter` while there is one thread, and before any data is read.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import platform
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import landlock, seccomp
from .environment import scrub
from .kernel import architecture, reason
from .limits import bound
from .privileges import drop
from .report import Protection, Report

__all__ = ["Needs", "enter"]

_DNS = 53

# Read by Python, libc, torch, gRPC; none holds a secret. Of /proc, this process and what is known of the machine.
_SYSTEM = (
    "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/usr/libexec", "/usr/share/zoneinfo",
    "/usr/share/locale", "/usr/share/ca-certificates", "/lib", "/lib32", "/lib64", "/nix/store",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf",
    "/etc/localtime", "/etc/timezone", "/etc/mime.types", "/etc/os-release",
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems",
    "/proc/sys/vm", "/proc/sys/kernel", "/proc/sys/net/core", "/sys/devices/system", "/sys/fs/cgroup",
    "/sys/kernel/mm/transparent_hugepage", "/dev/urandom", "/dev/random",
)  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")
_CUDA = (
    "/proc/driver", "/proc/devices", "/proc/modules", "/sys/module", "/sys/bus/pci", "/sys/devices", "/sys/class",
    "/usr/local/nvidia", "/usr/local/cuda", "/opt/nvidia",
)  # fmt: skip


class Needs(NamedTuple):
    """What a worker's process needs while it runs.

    `folder`: the worker's, of which it cannot read `secrets`; what it `writes` and `reads` besides. `ports`: where it
    listens, 0 for any. `authority`: HOST:PORT that renews its certificate, "" for none. `memory_mb`: 10^6 bytes that it
    may allocate, 0 for as much as there is. `network`: False leaves the network unrestricted. `cuda`: the GPUs' devices
    too."""

    folder: Path
    writes: tuple[Path, ...] = ()
    reads: tuple[Path, ...] = ()
    secrets: tuple[Path, ...] = ()
    ports: tuple[int, ...] = (0,)
    authority: str = ""
    memory_mb: int = 0
    network: bool = True
    cuda: bool = False


def enter(needs: Needs) -> Report:
    """Give up what is not needed, for good; what was given up, and what could not be and why. Raises nothing."""
    folder = needs.folder.resolve()
    needs = needs._replace(folder=folder)
    environment = scrub(folder)  # first: it reads what is refused afterwards
    limits = bound(needs.memory_mb)
    files, ports = _files(needs)
    privileges = drop((folder, *needs.writes, *needs.reads), needs.ports, os.geteuid())
    calls, sockets = _calls(needs)  # last: it refuses what the others do
    return Report((environment, limits, privileges, calls, files, _network(needs, sockets, ports)))


def _files(needs: Needs) -> tuple[Protection, str]:
    """Landlock, and why it does not bound the ports."""
    readable = len(_read(needs))
    access = landlock.Access(
        read=_read(needs),
        write=(*_open(needs), *needs.writes, *_linked(needs.folder)),
        make=(needs.folder,),
        devices=_devices(needs.cuda),
        listen=(*needs.ports, 0) if needs.network else None,  # 0: gRPC tries a socket of its own before it listens
        connect=_connectable(needs.authority) if needs.network else None,
    )
    try:
        version, uncovered = landlock.restrict(access)
    except OSError as error:
        absent = error.errno in (errno.ENOSYS, errno.EOPNOTSUPP)
        why = f"the kernel has no Landlock: {reason(error)}" if absent else f"Landlock: {reason(error)}"
        return Protection("files", False, why), why
    secret = f", {' and '.join(path.name for path in needs.secrets)} not readable" if needs.secrets else ""
    covered = f"only the worker's folder is writable{secret}, {readable} places readable (Landlock {version})"
    ports = uncovered or ("" if version >= 4 else f"Landlock {version} knows no ports: they came with 4, Linux 6.7")
    return Protection("files", not uncovered, uncovered or covered), ports


def _calls(needs: Needs) -> tuple[Protection, str]:
    """Seccomp, and why it does not bound sockets."""
    here = architecture()
    if here is None:
        why = f"no system calls are known for {platform.system()} on {platform.machine()}"
        return Protection("system calls", False, why), why
    sockets = seccomp.Sockets(bool(needs.authority), _is_name(needs.authority), needs.cuda) if needs.network else None
    try:
        seccomp.install(seccomp.program(here, os.getpid(), sockets))
    except OSError as error:
        why = f"seccomp: {reason(error)}"
        return Protection("system calls", False, why), why
    detail = f"programs, processes, {len(seccomp.REFUSED)} system calls refused (seccomp)"
    return Protection("system calls", True, detail), ""


def _network(needs: Needs, sockets: str, ports: str) -> Protection:
    if not needs.network:
        return Protection("network", False, 'unrestricted, as worker.toml says (sandbox.network = "open")')
    # Without connect(2) it takes no rule for ports to keep a process from connecting.
    missing = sockets or (ports if needs.authority else "")
    if missing:
        return Protection("network", False, missing)
    listens = ", ".join(str(port) if port else "a free one" for port in needs.ports)
    if not needs.authority:
        return Protection("network", True, f"connects to nobody, listens at port {listens}")
    port = needs.authority.rpartition(":")[2]
    lookup = ", looks up names" if _is_name(needs.authority) else ""
    return Protection("network", True, f"connects to port {port} only (the authority's){lookup}, listens at {listens}")


# -- what a process of Python and torch reads -------------------------------------------------------------


def _read(needs: Needs) -> tuple[Path, ...]:
    places = [Path(name) for name in (*_SYSTEM, *(_CUDA if needs.cuda else ()))]
    libraries = [Path(name) for name in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if name]
    return landlock.trees((*places, *needs.reads, *libraries, *_python()))


def _python() -> Iterator[Path]:
    """Where modules are imported from, all life long: torch imports on first use."""
    own = Path(__file__).resolve().parents[1]
    yield own
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield Path(sysconfig.get_path(name))
    if not _is_system(Path(sys.prefix)):  # a virtual or conda environment; of /usr the libraries are enough
        yield Path(sys.prefix)
    if not _is_system(Path(sys.base_prefix)):
        yield Path(sys.base_prefix)
    yield from map(Path, site.getsitepackages())
    named = {Path(name).resolve() for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name}
    for name in filter(None, sys.path):
        place = Path(name).resolve()
        if place in named or place.name in ("site-packages", "dist-packages", "lib-dynload") or place.suffix == ".zip":
            yield place


def _is_system(prefix: Path) -> bool:
    return prefix.resolve() in (Path("/"), Path("/usr"), Path("/usr/local"))


def _open(needs: Needs) -> tuple[Path, ...]:
    """The worker's folder, or all that is in it but secrets: rules only ever add, so that a tree has no exceptions."""
    hidden = {path.resolve() for path in needs.secrets}
    there = needs.folder.is_dir() and any(path.exists() for path in hidden)
    return tuple(path for path in needs.folder.iterdir() if path.resolve() not in hidden) if there else (needs.folder,)


def _linked(folder: Path) -> Iterator[Path]:
    """Folders of the worker's that lie elsewhere, behind a link: data on a larger disk."""
    if folder.is_dir():
        yield from (path.resolve() for path in sorted(folder.iterdir()) if path.is_symlink() and path.is_dir())


def _devices(cuda: bool) -> tuple[Path, ...]:
    """Devices; for CUDA also this process's own threads, whose names its driver writes, or does not start."""
    nodes = [*sorted(Path("/dev").glob("nvidia*")), Path("/proc/self/task")] if cuda else []
    return tuple(path for path in (*map(Path, _DEVICES), *nodes) if path.exists())


def _connectable(authority: str) -> tuple[int, ...]:
    if not authority:
        return ()
    port = int(authority.rpartition(":")[2])
    return (port, _DNS) if _is_name(authority) else (port,)


def _is_name(authority: str) -> bool:
    """Whether the authority is given by a name that has to be looked up."""
    host = authority.rpartition(":")[0].strip("[]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host not in ("", "localhost")
    return False
