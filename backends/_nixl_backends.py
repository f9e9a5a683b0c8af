"""NIXL's backends: which can carry from this process's memory to another's, and why one cannot be had."""

from __future__ import annotations

import ctypes
import os

from tensorferry.backends import _nixl_environment as environment
from tensorferry.backends._nixl_environment import RDMA, Unfit

STORAGE = {
    "POSIX": "files",
    "GDS": "files, from a GPU",
    "GDS_MT": "files, from a GPU",
    "OBJ": "an object store",
    "AZURE_BLOB": "an object store",
    "GUSLI": "block devices",
    "HF3FS": "files of a 3FS",
    "INFINIA": "an object store",
}
"""Backends of storage, and between what they move: there is no peer to write to."""

DEVICE_ONLY = {
    "GPUNETIO": "is driven from a GPU, and moves GPU memory",
}

_VARIABLES = {
    "UCX_TLS": "UCX_TLS has to hold a transport that leaves this host's memory, as tcp does",
    "UCX_NET_DEVICES": "UCX_NET_DEVICES has to name an interface that is up and has an address",
}
"""What helps where one of these is set."""

_NEEDS = "UCX needs an interface that is up (loopback will do), /sys, a /dev/shm to write to and open files (ulimit -n)"
"""As seen with each of them taken away."""

_OWN_WORDS = "`UCX_LOG_LEVEL=error tensorferry doctor --debug nixl` shows what UCX itself says"


def check_backend(backend: str, there: list[str]) -> None:
    """Raises Unfit for a backend that cannot do what a transport does, or that this wheel has not."""
    if backend in STORAGE:
        raise Unfit(
            f"NIXL's {backend} backend moves between memory and {STORAGE[backend]}, not into another process's memory",
            'Use backend="UCX"',
        )
    if backend in DEVICE_ONLY:
        raise Unfit(f"NIXL's {backend} backend {DEVICE_ONLY[backend]}; this transport moves host memory",
                    'Use backend="UCX"')  # fmt: skip
    if backend not in there:
        if not there and (folder := os.environ.get("NIXL_PLUGIN_DIR")):
            raise Unfit(f"NIXL finds no backend in NIXL_PLUGIN_DIR={folder}", "Change or unset NIXL_PLUGIN_DIR")
        able = sorted(set(there) - STORAGE.keys() - DEVICE_ONLY.keys())
        raise Unfit(f"this NIXL has no backend {backend!r}", f"It has: {', '.join(able) or 'none'}")


def explain_backend(backend: str, require: str, error: Exception) -> Unfit:
    """Why a backend that is there could not be created."""
    name = environment.module_name()
    for file in environment.bundled(name, f"nixl/libplugin_{backend}.so"):
        try:
            ctypes.CDLL(str(file))
        except OSError as problem:
            return environment.explain_library(str(problem), f"NIXL's {backend} backend", environment.lacking(file))
    if backend == "UCX" and require == RDMA:
        return Unfit(
            f"UCX cannot use the RDMA device that is active: {error}",
            "`ibv_devinfo` has to list it: its user-space driver is in Debian's ibverbs-providers",
        )
    variables = environment.said(*sorted(name for name in os.environ if name.startswith("UCX_")))
    told = " with " + ", ".join(f"{key}={value}" for key, value in variables.items()) if variables else ""
    hints = [hint for name, hint in _VARIABLES.items() if name in variables] or [_NEEDS]
    return Unfit(f"NIXL's {backend} backend does not start{told}: {error}", "; ".join([*hints, _OWN_WORDS]))
