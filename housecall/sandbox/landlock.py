"""Landlock: the files that a process may open and the TCP ports that it may use; everything else is refused.

Rules are for trees of files, and only ever add to each other. They bind the thread that asks for them and the threads
that it starts afterwards, so they are asked for before there is a second one. What is open already stays open.
(Salaün, "Landlock LSM: toward unprivileged sandboxing", 2021; the kernel's userspace-api/landlock.rst.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .kernel import prctl, reason, syscall, threads

__all__ = ["Access", "restrict", "trees", "version"]

# linux/landlock.h: what may be done with files ...
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FOR_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
# ... and what else.
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1 << 0, 1 << 1
_RULE_PATH, _RULE_PORT = 1, 2
_CREATE_VERSION = 1
_SET_NO_NEW_PRIVS = 38

READ = READ_FILE | READ_DIR
WRITE = READ | WRITE_FILE | TRUNCATE | MAKE_REG | MAKE_DIR | REMOVE_FILE | REMOVE_DIR | REFER
MAKE = WRITE & ~READ_FILE
DEVICE = READ | WRITE_FILE | TRUNCATE | IOCTL_DEV


class Access(NamedTuple):
    """Which trees of files may be read, written and made, made but not read, used as devices; at which TCP ports the
    process may listen and to which it may connect (`None`: any; port 0: one that the kernel chooses)."""

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    make: tuple[Path, ...] = ()
    devices: tuple[Path, ...] = ()
    listen: tuple[int, ...] | None = ()
    connect: tuple[int, ...] | None = ()


def version() -> int:
    """The kernel's version of Landlock, from 1. Raises `OSError` if it has none, or has it switched off."""
    return syscall("landlock_create_ruleset", 0, 0, _CREATE_VERSION)


def restrict(access: Access) -> tuple[int, str]:
    """Refuse this thread, and those it starts, everything but `access`; Landlock's version, and what is not covered.

    Raises `OSError` if Landlock is not to be had."""
    here = version()
    uncovered = "" if threads() == 1 else f"{threads()} threads ran already and all but this one stay outside"
    files = (1 << 13) - 1
    files |= (REFER if here >= 2 else 0) | (TRUNCATE if here >= 3 else 0) | (IOCTL_DEV if here >= 5 else 0)
    with _ruleset(here, files, _ports_handled(here, access)) as rules:
        kinds = ((access.read, READ), (access.write, WRITE), (access.make, MAKE), (access.devices, DEVICE))
        for paths, rights in kinds:
            for path in dict.fromkeys(paths):
                _allow_path(rules, path, rights & files)
        if here >= 4:
            for ports, right in ((access.listen, _BIND_TCP), (access.connect, _CONNECT_TCP)):
                for port in dict.fromkeys(ports or ()):
                    _add(rules, _RULE_PORT, struct.pack("=QQ", right, port))
        prctl(_SET_NO_NEW_PRIVS, 1)
        syscall("landlock_restrict_self", rules, 0)
    return here, uncovered


def _ports_handled(here: int, access: Access) -> int:
    if here < 4:
        return 0
    return (0 if access.listen is None else _BIND_TCP) | (0 if access.connect is None else _CONNECT_TCP)


@contextmanager
def _ruleset(here: int, files: int, ports: int) -> Iterator[int]:
    """An empty set of rules over what is named; closed at the end."""
    scopes = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL
    fields = (files,) if here < 4 else (files, ports) if here < 6 else (files, ports, scopes)
    attribute = ctypes.create_string_buffer(struct.pack(f"={len(fields)}Q", *fields), 8 * len(fields))
    handle = syscall("landlock_create_ruleset", ctypes.addressof(attribute), 8 * len(fields), 0)
    try:
        yield handle
    finally:
        os.close(handle)


def _allow_path(rules: int, path: Path, rights: int) -> None:
    """Rights in a tree, or of one file. What is not there, or not to be seen, needs no rule."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ELOOP):
            return
        raise
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _FOR_FILES
        _add(rules, _RULE_PATH, struct.pack("=Qi", rights, place))
    except OSError as error:
        raise OSError(error.errno, f"{reason(error)} for {path}") from None
    finally:
        os.close(place)


def _add(rules: int, kind: int, rule: bytes) -> None:
    attribute = ctypes.create_string_buffer(rule, len(rule))
    syscall("landlock_add_rule", rules, kind, ctypes.addressof(attribute), 0)


def trees(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Those of the paths that exist, without any that lie within another."""
    found = sorted({path.resolve() for path in paths if path.exists()})
    return tuple(path for path in found if not any(other in path.parents for other in found))
