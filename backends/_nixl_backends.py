"""NIXL's backends: which can carry from this process's memory to another's, and why one cannot be had."""

from __future__ import annotations

import ctypes

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
    variables = environment.said("UCX_TLS", "UCX_NET_DEVICES", "UCX_MODULES")
    told = " with " + ", ".join(f"{key}={value}" for key, value in variables.items()) if variables else ""
    return Unfit(
        f"NIXL's {backend} backend does not start{told}: {error}",
        "UCX_TLS has to hold a transport that leaves this host's memory, as tcp does"
        if variables
        else "UCX_LOG_LEVEL=info and NIXL_LOG_LEVEL=INFO say more, on standard error",
    )
