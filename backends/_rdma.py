"""The RDMA devices of this host, as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

_DEVICES = Path("/sys/class/infiniband")


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
