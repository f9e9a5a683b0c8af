"""The RDMA devices of this host as the kernel shows them, and what keeps this process from using one that is active."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Collection, Mapping
from pathlib import Path

_DEVICES = Path("/sys/class/infiniband")

ROOT = Path("/")

UNLIMITED = -1

NEEDS_LOCKED = 128 << 20
"""Bytes to register with default settings: the pool (59 MB) and the staging (67 MB)."""

MAY_BE_LOCKED = (
    "`ulimit -l unlimited`; systemd: LimitMEMLOCK=infinity; Docker: --ulimit memlock=-1, or --cap-add=IPC_LOCK"
)
"""What helps where too little may be locked."""

MAY_BE_OPENED = (
    "`modprobe ib_uverbs`; in a container --device=/dev/infiniband; else a udev rule that lets this user open it"
)
"""What helps where no active device can be opened."""

_CAP_IPC_LOCK = 14
"""From <linux/capability.h>."""


def rdma_ports() -> dict[str, bool]:
    """The RDMA devices, and whether a port of each is active."""
    devices: dict[str, bool] = {}
    for device in sorted(_DEVICES.glob("*")):
        states = []
        for state in device.glob("ports/*/state"):
            try:
                states.append(state.read_text(encoding="ascii"))
            except OSError:  # the port has just gone
                continue
        devices[device.name] = any("ACTIVE" in state for state in states)
    return devices


def why_not_usable(devices: Collection[str], engine: int = 0) -> tuple[str, str]:
    """Why this process cannot use any of these active devices, and what helps: it may not open them, or may not lock
    the memory that they would read and write, and `engine` bytes of the engine's own. ("", "") where neither is so.

    An engine does not say: Mooncake takes TCP without a word where it cannot open a device, and UCX tries again for
    ever, with a core and deaf to signals, where memory cannot be locked.
    """
    files = character_devices()
    opened, refused = first_opened({device: files.get(device, "") for device in devices})
    if not opened:
        return "; ".join(refused), MAY_BE_OPENED
    limit, needed = memlock(), NEEDS_LOCKED + engine
    if limit == UNLIMITED or may_lock() or limit >= needed:
        return "", ""
    what = "pool, staging and the engine's own buffers" if engine else "pool and staging"
    return (
        f"`ulimit -l` allows {limit >> 10} KiB to be locked, and RDMA locks {what}: {needed >> 10} KiB with default "
        "settings",
        MAY_BE_LOCKED,
    )


# ---- opening a device ----------------------------------------------------------------------------------------


def character_devices(root: Path = ROOT) -> dict[str, str]:
    """RDMA device -> the file by which a program uses it: /dev/infiniband/uverbs0. Devices without one are left out."""
    found = {}
    for path in (root / "sys/class/infiniband_verbs").glob("uverbs*"):
        try:
            found[(path / "ibdev").read_text(encoding="ascii").strip()] = f"/dev/infiniband/{path.name}"
        except OSError:  # the device has just gone
            continue
    return found


def first_opened(files: Mapping[str, str], root: Path = ROOT) -> tuple[str, list[str]]:
    """Of the files of RDMA devices by name, the first that this process can open; "" where there is none, and what was
    said about each until then."""
    refused = []
    for device, path in files.items():
        if not path:
            refused.append(f"{device} has no character device (module ib_uverbs)")
            continue
        try:
            os.close(os.open(root / path.lstrip("/"), os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            refused.append(f"{path} ({device}): {error.strerror}")
        else:
            return path, refused
    return "", refused


# ---- locking memory ------------------------------------------------------------------------------------------


def memlock() -> int:
    """Bytes that may be locked; UNLIMITED."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return UNLIMITED if limit == resource.RLIM_INFINITY else limit


def may_lock(root: Path = ROOT) -> bool:
    """CAP_IPC_LOCK: the limit on locked memory does not count.

    The kernel asks whether it is held in the first user namespace: the root of another one, as in a container without
    root, has the capability there, and is bound by the limit all the same.
    """
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", _text(root / "proc/self/status"), re.MULTILINE)
    has = bool(found and int(found[1], 16) >> _CAP_IPC_LOCK & 1)
    return has and _text(root / "proc/self/uid_map").split() in ([], ["0", "0", "4294967295"])


def why_not_locked(nbytes: int, root: Path = ROOT) -> str:
    """Why a device could not lock so many bytes more for this process; "" where nothing stands against it."""
    limit = memlock()
    if limit == UNLIMITED or may_lock(root):
        return ""
    found = re.search(r"^VmPin:\s*(\d+) kB", _text(root / "proc/self/status"), re.MULTILINE)
    locked = int(found[1]) << 10 if found else 0
    if locked + nbytes <= limit:
        return ""
    return f"`ulimit -l` allows {limit >> 10} KiB to be locked, and {locked >> 10} KiB are"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
