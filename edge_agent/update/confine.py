"""A candidate's process without a socket, without another program, and without a look into its neighbours.

systemd's unit cannot say this of a child alone, and a namespace of its own is forbidden there
(RestrictNamespaces), so the child asks the kernel itself: a seccomp filter, which needs no privilege and
cannot be taken off again. The calls below return EPERM in this process and in every thread it starts. It
hides no file: what the child may write is what its user may.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import NamedTuple

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ERRNO with EPERM
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data


class _Calls(NamedTuple):
    """An architecture's AUDIT_ARCH value and its numbers of the refused calls (asm/unistd.h).

    In order: socket, execve, execveat, ptrace, process_vm_readv, process_vm_writev, io_uring_setup (which
    can make sockets, too).
    """

    audit: int
    refused: tuple[int, ...]
    foreign_from: int = 0  # numbers from here on are of another calling convention


_CALLS: dict[str, _Calls] = {
    "x86_64": _Calls(0xC000003E, (41, 59, 322, 101, 310, 311, 425), 0x40000000),
    "aarch64": _Calls(0xC00000B7, (198, 221, 281, 117, 270, 271, 425)),
    "armv7l": _Calls(0x40000028, (281, 11, 387, 26, 376, 377, 425)),
}


def confine() -> str:
    """Take the calls away from this process for good; returns why not where that is not possible."""
    calls = _CALLS.get(platform.machine())
    if calls is None:
        return f"no filter is known for {platform.machine()}"
    program = _program(calls)
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, then (after padding) where they are.
    pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _FILTER, pointer, 0, 0):
        return f"seccomp: {os.strerror(ctypes.get_errno())}"
    return ""


def _program(calls: _Calls) -> bytes:
    """Refuse foreign architectures and conventions, and the calls of the table; allow the rest."""
    tests = [(_IF_EQUAL, number) for number in calls.refused]
    if calls.foreign_from:
        tests.insert(0, (_IF_AT_LEAST, calls.foreign_from))
    refuse_at = len(tests) + 4  # after: load, compare, load, the tests, allow
    lines = [
        _line(_LOAD, _ARCHITECTURE_AT),
        _line(_IF_EQUAL, calls.audit, otherwise=refuse_at - 2),
        _line(_LOAD, _NUMBER_AT),
        *(_line(code, value, then=refuse_at - 4 - i) for i, (code, value) in enumerate(tests)),
        _line(_RETURN, _ALLOW),
        _line(_RETURN, _REFUSE),
    ]
    return b"".join(lines)


def _line(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """struct sock_filter; jumps count the lines that are passed over."""
    return struct.pack("=HBBI", code, then, otherwise, value)
