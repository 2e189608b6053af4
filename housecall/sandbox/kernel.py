"""System calls by name, for the two architectures whose numbers are written here, and no others.

What must live here: numbers, and the one place that calls the kernel by number. What must not: what is refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["ARCHITECTURES", "Architecture", "architecture", "prctl", "reason", "syscall", "threads"]


class Architecture(NamedTuple):
    """`audit`: its number in seccomp's data (linux/audit.h). `calls`: its system calls that are spoken of here."""

    name: str
    audit: int
    calls: Mapping[str, int]


# asm/unistd_64.h and asm-generic/unistd.h. From 424 on, numbers are the same everywhere.
_ALIKE = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443,
    "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446, "process_mrelease": 448,
    "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466, "open_tree_attr": 467,
}  # fmt: skip
_X86_64 = {
    "ioctl": 16, "socket": 41, "connect": 42, "sendto": 44, "sendmsg": 46, "clone": 56, "fork": 57, "vfork": 58,
    "execve": 59, "kill": 62, "chmod": 90, "chown": 92, "fchown": 93, "lchown": 94, "ptrace": 101, "syslog": 103,
    "setuid": 105, "setgid": 106, "setreuid": 113, "setregid": 114, "setgroups": 116, "setresuid": 117,
    "setresgid": 119, "setfsuid": 122, "setfsgid": 123, "capget": 125, "capset": 126, "rt_sigqueueinfo": 129,
    "personality": 135, "vhangup": 153, "modify_ldt": 154, "pivot_root": 155, "adjtimex": 159, "chroot": 161,
    "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
    "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
    "quotactl": 179, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198,
    "fremovexattr": 199, "tkill": 200, "lookup_dcookie": 212, "clock_settime": 227, "tgkill": 234, "kexec_load": 246,
    "add_key": 248, "request_key": 249, "keyctl": 250, "fchownat": 260, "fchmodat": 268, "unshare": 272,
    "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "fanotify_init": 300, "prlimit64": 302,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "sendmmsg": 307, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "seccomp": 317,
    "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323,
}  # fmt: skip
_AARCH64 = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
    "lookup_dcookie": 18, "ioctl": 29, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "fchmodat": 53,
    "fchownat": 54, "fchown": 55, "vhangup": 58, "quotactl": 60, "acct": 89, "capget": 90, "capset": 91,
    "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106,
    "clock_settime": 112, "syslog": 116, "ptrace": 117, "kill": 129, "tkill": 130, "tgkill": 131,
    "rt_sigqueueinfo": 138, "reboot": 142, "setregid": 143, "setgid": 144, "setreuid": 145, "setuid": 146,
    "setresuid": 147, "setresgid": 149, "setfsuid": 151, "setfsgid": 152, "setgroups": 159, "sethostname": 161,
    "setdomainname": 162, "settimeofday": 170, "adjtimex": 171, "socket": 198, "connect": 203, "sendto": 206,
    "sendmsg": 211, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220, "execve": 221, "swapon": 224,
    "swapoff": 225, "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "prlimit64": 261, "fanotify_init": 262,
    "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "sendmmsg": 269,
    "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "seccomp": 277, "bpf": 280,
    "execveat": 281, "userfaultfd": 282, "kexec_file_load": 294,
}  # fmt: skip
ARCHITECTURES = (
    Architecture("x86_64", 0xC000003E, {**_ALIKE, **_X86_64}),
    Architecture("aarch64", 0xC00000B7, {**_ALIKE, **_AARCH64}),
)


def architecture() -> Architecture | None:
    """That of this process, if its numbers are known and its kernel is Linux."""
    if not sys.platform.startswith("linux") or sys.maxsize < 1 << 32:
        return None  # a 32-bit process on a 64-bit kernel has other numbers
    return next((known for known in ARCHITECTURES if known.name == platform.machine()), None)


def syscall(name: str, *arguments: int) -> int:
    """Make a system call. Addresses are passed as numbers: their objects must outlive the call.

    Raises `OSError`: ENOSYS if the kernel has no such call, or its number is not known here."""
    here = architecture()
    if here is None or name not in here.calls:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return _checked(libc.syscall(*map(ctypes.c_long, (here.calls[name], *arguments))))


def prctl(option: int, *arguments: int) -> int:
    """What prctl(2) does. Raises `OSError`."""
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    four = (*arguments, 0, 0, 0, 0)[:4]
    return _checked(ctypes.CDLL(None, use_errno=True).prctl(option, *map(ctypes.c_ulong, four)))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def reason(error: OSError) -> str:
    """An error of the kernel, in its own words."""
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"


def threads() -> int:
    """How many threads this process has, those of libraries too; 0 if the kernel does not say."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0
