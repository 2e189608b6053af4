"""What a process is born with: variables, open files, a terminal, a umask. All but what a worker needs goes.

NOTE [Begin again]
A variable that is deleted is still in the memory that the kernel filled at the start, and in copies that Python made.
So a process that was started with more than the list below starts itself anew, as the same process, without them,
before it has read anything (`begin_again`). It does so too if libraries that are imported already have started
threads: those would stay outside the sandbox, which a thread enters for itself and for those that it starts.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from .kernel import reason, threads
from .report import Protection

__all__ = ["begin_again", "born_clean", "kept", "scrub"]

KEPT = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_MODULE_LOADING", "CUDA_VISIBLE_DEVICES",
        "COLUMNS", "GRPC_DNS_RESOLVER", "GRPC_TRACE", "GRPC_VERBOSITY", "HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH",
        "LD_PRELOAD", "LINES", "LOGNAME", "NO_COLOR", "NVIDIA_VISIBLE_DEVICES", "PATH", "PYTHONDONTWRITEBYTECODE",
        "PYTHONFAULTHANDLER", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONIOENCODING", "PYTHONPATH", "PYTHONSAFEPATH",
        "PYTHONUNBUFFERED", "PYTHONUTF8", "PYTHONWARNINGS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "SHELL",
        "TERM", "TZ", "USER", "VIRTUAL_ENV",
    }
)  # fmt: skip
PREFIXES = ("GOMP_", "KMP_", "LC_", "MKL_", "OMP_", "OPENBLAS_")
AGAIN = "HOUSECALL_BEGAN_AGAIN"  # so that it happens once, whatever comes of it


def kept(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that a worker keeps: for paths, language, devices and threads, none of them a place for secrets."""
    return {name: value for name, value in variables.items() if name in KEPT or name.startswith(PREFIXES)}


def born_clean(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment for a new worker's process, which then has no reason to begin again."""
    return {**kept(variables), "OPENBLAS_NUM_THREADS": "1"}  # numpy's, which starts threads when it is imported


def begin_again() -> None:
    """Start this program anew without the variables that it should not have, and without threads, if it has either.

    Call it first in `main`. It returns if there is no reason to, or if it has done so before."""
    variables = dict(os.environ)
    if AGAIN in variables or (born_clean(variables) == variables and threads() <= 1):
        return
    if not sys.executable or not sys.orig_argv:
        return  # embedded in another program; `scrub` does what can be done
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**born_clean(variables), AGAIN: "1"})  # noqa: S606  # this very program


def scrub(folder: Path) -> Protection:
    """Drop variables and inherited files, read nothing from a terminal, and live in `folder`."""
    late = {name for name in _born() if name != AGAIN and not kept({name: ""})}
    for name in {*os.environ} - {*kept(os.environ)}:
        del os.environ[name]
    os.umask(0o077)
    try:
        _forget(Path.cwd(), sys.path)
        os.chdir(folder)
        _no_input()
        closed = _close_inherited()
    except OSError as error:
        return Protection("environment", False, f"could not be cleaned: {reason(error)}")
    if late:
        return Protection("environment", False, f"variables were dropped too late to leave memory: {_few(late)}")
    files = f", {closed} inherited files closed" if closed else ""
    return Protection("environment", True, f"{len(os.environ)} harmless variables, umask 077, no input{files}")


def _born() -> tuple[str, ...]:
    """The names that this process was started with: their values are in its memory, whatever became of them."""
    try:
        pairs = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return tuple(os.environ)
    return tuple(os.fsdecode(pair.partition(b"=")[0]) for pair in pairs if pair)


def _forget(here: Path, path: list[str]) -> None:
    """Import nothing from the folder where the program was started, which `python -m` would."""
    own = Path(__file__).resolve().parents[2]
    if here.resolve() != own:
        path[:] = [place for place in path if place not in ("", ".", str(here))]


def _no_input() -> None:
    handle = os.open(os.devnull, os.O_RDONLY)
    os.dup2(handle, 0)
    if handle != 0:
        os.close(handle)


def _close_inherited() -> int:
    """Close what outlives an exec: nothing that this process opened itself does (PEP 446)."""
    count = 0
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        try:
            inherited = number > 2 and not fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        except OSError:
            continue  # it was the listing's own
        if inherited:
            os.close(number)
            count += 1
    return count


def _few(names: set[str]) -> str:
    """Names, never values; not more of them than a line holds."""
    first = sorted(names)[:5]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
