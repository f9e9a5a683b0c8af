"""Pages from the kernel, by the calls themselves: `mmap.mmap` keeps a descriptor open per mapping (until
Python 3.13), does not tell its address, and holds the GIL while the kernel fills pages in.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

_libc = ctypes.CDLL(None, use_errno=True)  # CDLL releases the GIL during each call
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.restype = ctypes.c_int
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0

# Values of Linux, equal on every architecture that it runs on. The mmap module names them only from Python
# 3.13 on.
MADV_DONTFORK = 10
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23  # since Linux 5.14


def _unmap(address: int, nbytes: int, pid: int) -> None:
    # In a forked child these addresses may belong to something else by now (MADV_DONTFORK leaves a hole).
    if os.getpid() == pid:
        _libc.munmap(address, nbytes)


class Mapping:
    """`nbytes` bytes of zeroed memory, page aligned: private, or shared through the file descriptor `fd`.

    Unmapped when the last reference goes; `fd` is not kept and may be closed. Raises OSError.
    """

    __slots__ = ("__weakref__", "address", "nbytes")

    def __init__(self, nbytes: int, fd: int | None = None) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if fd is None else mmap.MAP_SHARED
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, nbytes, access, flags, -1 if fd is None else fd, 0)
        if address is None or address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map {nbytes} bytes: {os.strerror(code)}")
        self.address: int = address
        self.nbytes = nbytes
        # Not at exit: threads may still be copying then, and the kernel unmaps everything anyway.
        weakref.finalize(self, _unmap, address, nbytes, os.getpid()).atexit = False

    def advise(self, advice: int, start: int = 0, nbytes: int | None = None) -> int:
        """madvise on part of the mapping; 0, or the errno: advice that a kernel does not know is no failure."""
        length = self.nbytes - start if nbytes is None else nbytes
        if _libc.madvise(self.address + start, length, advice) == 0:
            return 0
        return ctypes.get_errno()

    def seal(self) -> None:
        """Give the pages back and keep the addresses, for as long as this object lives: whoever reads or writes there
        finds nothing, and never what somebody else has put there since. Raises OSError."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        if _libc.mmap(self.address, self.nbytes, _PROT_NONE, flags, -1, 0) == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot seal {self.nbytes} bytes: {os.strerror(code)}")

    def populate(self, start: int = 0, nbytes: int | None = None) -> None:
        """Bring the pages in now, so that no copy pays for it later. Raises OSError where there is no memory."""
        while (code := self.advise(MADV_POPULATE_WRITE, start, nbytes)) in (errno.EINTR, errno.EAGAIN):
            pass
        if code not in (0, errno.EINVAL):  # EINVAL: an older kernel; the pages come with the first write
            raise OSError(code, f"cannot bring in {self.nbytes} bytes: {os.strerror(code)}")
