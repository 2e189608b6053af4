"""What root could do, and a debugger: capabilities dropped, none to be had, memory not to be read from outside."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

from .kernel import prctl, reason, syscall
from .report import Protection

__all__ = ["drop"]

# linux/prctl.h, linux/capability.h
_SET_DUMPABLE, _SET_NO_NEW_PRIVS, _CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL = 4, 38, 47, 4
_CAP_VERSION = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH, _NET_BIND_SERVICE = 1 << 1, 1 << 2, 1 << 10


def drop(own: Iterable[Path], ports: Iterable[int], user: int) -> Protection:
    """Give up every capability but those without which `user` (a number) could not serve files of other users in
    `own`, or listen at `ports`; and become undumpable, so that a user's other programs cannot read this one's keys.

    For the calling thread, and those that it starts."""
    if not sys.platform.startswith("linux"):
        return Protection("privileges", False, "this system is not Linux")
    needed = 0
    if any(path.exists() and path.stat().st_uid != user for path in own):
        needed |= _DAC_OVERRIDE | _DAC_READ_SEARCH
    if any(0 < port < 1024 for port in ports):
        needed |= _NET_BIND_SERVICE
    try:
        prctl(_SET_NO_NEW_PRIVS, 1)
        prctl(_SET_DUMPABLE, 0)
        left = _keep_only(needed)
    except OSError as error:
        return Protection("privileges", False, reason(error))
    capabilities = f"capabilities {left:#x} only" if left else "no capabilities"
    return Protection("privileges", True, f"{capabilities}, none to be gained, memory closed to debuggers")


def _keep_only(needed: int) -> int:
    """Keep of this thread's capabilities those in `needed` (bits), which are all below 32; those that are left."""
    header = (ctypes.c_uint32 * 2)(_CAP_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # (effective, permitted, inheritable), twice: low bits, high bits
    syscall("capget", ctypes.addressof(header), ctypes.addressof(sets))
    left = sets[1] & needed
    if not any(sets):
        return 0
    prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL)
    sets[:] = [left, left, 0, 0, 0, 0]
    syscall("capset", ctypes.addressof(header), ctypes.addressof(sets))
    return left
