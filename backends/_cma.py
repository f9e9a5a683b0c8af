"""Copies between processes (CMA): whether the kernel lets this one copy from and to another's memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def ptrace_scope() -> str:
    """What Yama lets processes do to each other: "0" to "3", or "none" where it is not there."""
    try:
        return Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii").strip()
    except OSError:
        return "none"


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def copy_refused(pid: int, address: int) -> str:
    """Why this process may not copy from and to the memory of `pid` (by CMA, which UCX uses); "" where it may.

    Reads the byte at `address`: the kernel asks the same of a reader as of a writer.
    """
    here = ctypes.create_string_buffer(1)
    local = _Iovec(ctypes.addressof(here), 1)
    remote = _Iovec(address, 1)
    ctypes.set_errno(0)
    if _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == 1:
        return ""
    return os.strerror(ctypes.get_errno())
