"""Seccomp: a filter of system calls, as a program that the kernel runs before each (classic BPF).

What must live here: which calls are refused, the program that refuses them, and its installation. The list is closed,
by name, and reads from top to bottom as the program does: the first rule that fits decides, and the rest is allowed.

A refused call fails with EPERM, as if the caller lacked the right to it, and Python turns that into an error like any
other. Two are told ENOSYS instead, and libc then uses what it used before them: clone3, whose flags lie in memory that
a filter cannot see, and x32's calls. Code for another architecture than the process's own ends the process.
(Drewry, seccomp-bpf, Linux 3.5; the kernel's userspace-api/seccomp_filter.rst. McCanne & Jacobson 1993 for BPF.)
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .kernel import Architecture, prctl, syscall

__all__ = ["REFUSED", "Sockets", "install", "program"]

REFUSED = (
    # other programs, other processes
    "execve", "execveat", "fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise",
    "process_mrelease", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "kcmp", "tkill", "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    # file systems and namespaces
    "mount", "umount2", "move_mount", "open_tree", "open_tree_attr", "fsopen", "fsconfig", "fsmount", "fspick",
    "mount_setattr", "pivot_root", "chroot", "unshare", "setns", "quotactl", "quotactl_fd", "fanotify_init",
    "open_by_handle_at", "name_to_handle_at",
    # what Landlock does not watch: whose a file is, and who may read it
    "chmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchown", "fchownat", "setxattr", "lsetxattr", "fsetxattr",
    "setxattrat", "removexattr", "lremovexattr", "fremovexattr", "removexattrat",
    # the machine
    "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff",
    "acct", "syslog", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname",
    "iopl", "ioperm", "modify_ldt", "vhangup", "personality", "lookup_dcookie",
    # where the kernel is large, and its holes have been
    "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl",
    "add_key", "request_key",
    # who one is
    "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "setfsuid", "setfsgid",
    "capset",
)  # fmt: skip

# linux/seccomp.h, linux/bpf_common.h
_SET_MODE_FILTER, _TSYNC = 1, 1
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _RETURN, _AND = 0x20, 0x06, 0x54  # a 32-bit word of seccomp_data; a constant
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_X32 = 0x40000000
_GET_SECCOMP, _SET_NO_NEW_PRIVS = 21, 38

_CLONE_THREAD = 0x00010000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # type for whoever reads the terminal next
_MSG_FASTOPEN = 0x20000000  # a connection without connect(2)
# What socket(2) may be asked for: (family, type, protocol), by their numbers in linux/socket.h, net.h and in.h.
_SOCK_TYPE = 0xF  # its other bits are flags
_INET, _INET6 = 2, 10
_STREAMS = tuple((family, 1, protocol) for family in (_INET, _INET6) for protocol in (0, 6))  # TCP
_DATAGRAMS = tuple((family, 2, protocol) for family in (_INET, _INET6) for protocol in (0, 17))  # UDP
_PACKETS = ((1, 5, 0),)  # AF_UNIX, SOCK_SEQPACKET
_NETLINK = ((16, 3, 0), (16, 2, 0))  # routes, which tell libc the addresses of this machine


class Sockets(NamedTuple):
    """`connect`: connections may be made, over TCP. `datagrams`: and UDP sent, for names to be looked up. `packets`: a
    local socket of packets may be made, without which CUDA's driver does not start."""

    connect: bool = False
    datagrams: bool = False
    packets: bool = False


class _Step(NamedTuple):
    """An instruction of the machine (struct sock_filter): jumps count from the next one."""

    code: int
    value: int
    then: int = 0
    otherwise: int = 0


def program(architecture: Architecture, pid: int, sockets: Sockets | None) -> list[_Step]:
    """The filter for a process of this number. Without `sockets` the network is left as it is."""
    steps = [
        _Step(_LOAD, _ARCH_AT),
        _Step(_EQUAL, architecture.audit, 1, 0),
        _Step(_RETURN, _KILL_PROCESS),
        _Step(_LOAD, _NUMBER_AT),
    ]
    if architecture.name == "x86_64":
        steps += [_Step(_AT_LEAST, _X32, 0, 1), _refuse(errno.ENOSYS)]
    calls = architecture.calls
    refused = [*REFUSED, *(["connect"] if sockets is not None and not sockets.connect else [])]
    for name in refused:
        if name in calls:  # the rest are not to be had on this architecture
            steps += [_Step(_EQUAL, calls[name], 0, 1), _refuse()]
    steps += [_Step(_EQUAL, calls["clone3"], 0, 1), _refuse(errno.ENOSYS)]
    for name, rule in _conditions(pid, sockets):
        steps += [_Step(_EQUAL, calls[name], 0, len(rule)), *rule]
    return [*steps, _Step(_RETURN, _ALLOW)]


def _conditions(pid: int, sockets: Sockets | None) -> Iterator[tuple[str, list[_Step]]]:
    """Calls that are refused or not by an argument. The kernel takes the low half of each, and so does the filter."""
    yield "clone", [_argument(0), _Step(_ANY_BIT, _CLONE_THREAD, 1, 0), _refuse(), _allow()]  # threads only
    for name in ("kill", "tgkill"):
        yield name, [_argument(0), _Step(_EQUAL, pid, 1, 0), _refuse(), _allow()]  # itself only
    yield "prlimit64", [_argument(0), _Step(_EQUAL, 0, 1, 0), _refuse(), _allow()]
    yield "ioctl", [_argument(1), _Step(_EQUAL, _TIOCSTI, 1, 0), _Step(_EQUAL, _TIOCLINUX, 0, 1), _refuse(), _allow()]
    if sockets is None:
        return
    for name, at in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        yield name, [_argument(at), _Step(_ANY_BIT, _MSG_FASTOPEN, 0, 1), _refuse(), _allow()]
    yield "socket", _socket(sockets)


def _socket(sockets: Sockets) -> list[_Step]:
    """Sockets of the table only. Of no other family: local sockets reach the services of this machine. Of no other
    protocol: Landlock watches TCP, and neither MPTCP nor SCTP."""
    allowed = [*_NETLINK, *_STREAMS, *(_DATAGRAMS if sockets.datagrams else ())]
    allowed += _PACKETS if sockets.packets else ()
    steps: list[_Step] = []
    for family, kind, protocol in allowed:
        steps += [_argument(0), _Step(_EQUAL, family, 0, 6)]
        steps += [_argument(1), _Step(_AND, _SOCK_TYPE), _Step(_EQUAL, kind, 0, 3)]
        steps += [_argument(2), _Step(_EQUAL, protocol, 0, 1), _allow()]
    return [*steps, _refuse()]


def _argument(number: int) -> _Step:
    return _Step(_LOAD, _ARGUMENTS_AT + 8 * number)


def _refuse(number: int = errno.EPERM) -> _Step:
    return _Step(_RETURN, _ERRNO | number)


def _allow() -> _Step:
    return _Step(_RETURN, _ALLOW)


def install(steps: list[_Step]) -> None:
    """Have the kernel run a filter before every system call of every thread, for good. Raises `OSError`."""
    prctl(_GET_SECCOMP)  # says so if the kernel has none
    prctl(_SET_NO_NEW_PRIVS, 1)
    code = b"".join(struct.pack("=HBBI", step.code, step.then, step.otherwise, step.value) for step in steps)
    instructions = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(instructions)))
    strayed = syscall("seccomp", _SET_MODE_FILTER, _TSYNC, ctypes.addressof(header))
    if strayed:  # a thread that has another filter than this one, by its number
        raise OSError(errno.EBUSY, f"thread {strayed} has a filter of its own")
