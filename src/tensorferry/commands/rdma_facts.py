"""RDMA from the hardware up: the devices as the kernel shows them, and the first thing that stands in the way."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tensorferry.backends._rdma import MAY_BE_LOCKED, MAY_BE_OPENED, NEEDS_LOCKED, character_devices, first_opened
from tensorferry.commands.carry_view import in_bytes
from tensorferry.commands.examining import Examined, Verbs
from tensorferry.commands.host_facts import ROOT, UNLIMITED, container, text
from tensorferry.core.transport import Readiness

_MELLANOX = "0x15b3"
_INFINIBAND_CLASS = "0x0207"
"""From pci.ids."""

_DRIVERS = {
    "mlx5_core": "mlx5_ib", "mlx4_core": "mlx4_ib", "bnxt_en": "bnxt_re", "ice": "irdma", "i40e": "irdma",
    "qede": "qedr", "hns3": "hns_roce_hw_v2", "cxgb4": "iw_cxgb4", "efa": "efa",
}  # fmt: skip
"""A card's network driver -> the kernel module that makes an RDMA device of it."""


@dataclass(frozen=True, slots=True)
class Gid:
    index: int
    value: str
    kind: str
    """RoCE v2, RoCE v1 (the kernel says IB/RoCE v1), InfiniBand"""
    interface: str

    def __str__(self) -> str:
        return f"{self.index}: {self.value} ({self.kind}{f', {self.interface}' if self.interface else ''})"


@dataclass(frozen=True, slots=True)
class Port:
    number: int
    state: str
    physical: str
    link_layer: str
    rate: str
    gids: tuple[Gid, ...]

    @property
    def active(self) -> bool:
        return self.state == "ACTIVE"

    def __str__(self) -> str:
        return f"port {self.number} {self.state} ({self.physical}, {self.link_layer}, {self.rate})"


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    driver: str
    firmware: str
    character_device: str
    """/dev/infiniband/uverbs0; empty where the kernel shows none"""
    ports: tuple[Port, ...]

    @property
    def active(self) -> bool:
        return any(port.active for port in self.ports)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"active": self.active}


class State(StrEnum):
    OK = "ok"
    MISSING = "missing"
    NOT_REACHED = "not looked at"


@dataclass(frozen=True, slots=True)
class Step:
    """One rung of the ladder."""

    name: str
    state: State
    found: str = ""
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"step": self.name, "state": str(self.state), "found": self.found, "remedy": self.remedy}


# ---- what the kernel shows -----------------------------------------------------------------------------------


def devices(root: Path = ROOT) -> list[Device]:
    verbs = character_devices(root)
    return [_device(path, verbs) for path in sorted((root / "sys/class/infiniband").glob("*"))]


def _device(path: Path, verbs: Mapping[str, str]) -> Device:
    numbers = sorted(int(one.name) for one in (path / "ports").glob("*") if one.name.isdecimal())
    driver = ""
    with suppress(OSError):
        driver = os.path.basename(os.readlink(path / "device/driver"))
    if not driver and (path / "parent").exists():  # a software device stands on a network interface
        driver = f"software, on {text(path / 'parent')}"
    return Device(
        path.name,
        driver or "unknown",
        text(path / "fw_ver"),
        verbs.get(path.name, ""),
        tuple(_port(path / "ports" / str(number), number) for number in numbers),
    )


def _port(path: Path, number: int) -> Port:
    layer = text(path / "link_layer") or "unknown"
    found = []
    for file in (path / "gids").glob("*"):
        value = text(file)
        with suppress(ValueError):
            if int(value.replace(":", ""), 16) and not value.endswith("0000:0000:0000:0000"):  # a prefix alone is none
                kind = text(path / "gid_attrs/types" / file.name)
                kind = "InfiniBand" if layer == "InfiniBand" else kind.removeprefix("IB/") or "unknown"
                interface = text(path / "gid_attrs/ndevs" / file.name)
                found.append(Gid(int(file.name), str(_short(value)), kind, interface))
    found.sort(key=lambda gid: gid.index)
    return Port(
        number,
        _word(text(path / "state")),
        _word(text(path / "phys_state")),
        layer,
        text(path / "rate"),
        tuple(found),
    )


def _word(state: str) -> str:
    """`4: ACTIVE`, as /sys has it, without the number."""
    return state.partition(": ")[2] or state or "unknown"


def _short(gid: str) -> str:
    address = ipaddress.IPv6Address(gid)
    return f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else str(address)


def idle_cards(root: Path = ROOT) -> list[tuple[str, str]]:
    """(PCI address, network driver) of cards that could do RDMA by the looks of them."""
    found = []
    for card in sorted((root / "sys/bus/pci/devices").glob("*")):
        kind, vendor, driver = text(card / "class"), text(card / "vendor"), ""
        with suppress(OSError):
            driver = os.path.basename(os.readlink(card / "driver"))
        network = kind.startswith("0x02")
        if kind.startswith(_INFINIBAND_CLASS) or (network and (vendor == _MELLANOX or driver in _DRIVERS)):
            found.append((card.name, driver))
    return found


# ---- why not RDMA? -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """All that the ladder stands on, so that each rung can be taken away."""

    devices: Sequence[Device]
    verbs: Callable[[], Verbs]
    """Asked when the rung is reached."""
    engines: Mapping[str, Examined]
    """Transports that are not built in, by name. Empty where none was asked about."""
    memlock: int
    may_lock: bool
    root: Path = ROOT


RUNGS: tuple[tuple[str, Callable[[Ground], Step | str]], ...]
"""A rung answers with what it found, or with the Step that says what is missing."""


def why_not(ground: Ground) -> list[Step]:
    """Every rung from the hardware up, to the first that is missing; those above it are not looked at."""
    steps: list[Step] = []
    for name, look in RUNGS:
        if steps and steps[-1].state is not State.OK:
            steps.append(Step(name, State.NOT_REACHED))
            continue
        answer = look(ground)
        steps.append(answer if isinstance(answer, Step) else Step(name, State.OK, answer))
    return steps


def answer(steps: Sequence[Step]) -> str:
    """The ladder in one sentence."""
    for step in steps:
        if step.state is State.MISSING:
            return f"no RDMA: {step.found}"
        if step.state is State.NOT_REACHED:
            return f"nothing that was looked at stands against RDMA; {step.name} was not"
    return f"RDMA works: {steps[-1].found}"


def _active(ground: Ground) -> list[Device]:
    return [device for device in ground.devices if device.active]


def _has_device(ground: Ground) -> Step | str:
    if ground.devices:
        return "; ".join(f"{d.name} ({d.driver}{f', firmware {d.firmware}' if d.firmware else ''})"
                         for d in ground.devices)  # fmt: skip
    cards = idle_cards(ground.root)
    if cards:
        address, driver = cards[0]
        module = _DRIVERS.get(driver, "mlx5_ib")
        return Step(
            "device",
            State.MISSING,
            f"the card at PCI {address} could do RDMA, and the kernel has made no RDMA device of it",
            f"`modprobe {module}`. In a container: on the host, and /sys/class/infiniband has to be seen inside",
        )
    inside = container(ground.root).startswith("yes")
    return Step(
        "device",
        State.MISSING,
        "there is no RDMA device (/sys/class/infiniband is empty), and no card that could be one",
        ("Give the container its devices (--device=/dev/infiniband, or the device plugin of the cluster). " if inside
         else "")
        + "Without a card, RDMA can be tried over any network: `modprobe rdma_rxe`, "
        "`rdma link add rxe0 type rxe netdev eth0`",
    )  # fmt: skip


def _has_port(ground: Ground) -> Step | str:
    active = _active(ground)
    if active:
        down = [d.name for d in ground.devices if not d.active]
        ports = "; ".join(f"{d.name} {p}" for d in active for p in d.ports if p.active)
        return ports + (f"; not active: {', '.join(down)}" if down else "")
    states = "; ".join(f"{d.name} {', '.join(map(str, d.ports)) or 'has no port'}" for d in ground.devices)
    initialising = any(port.state == "INIT" for device in ground.devices for port in device.ports)
    return Step(
        "port",
        State.MISSING,
        f"no port is active: {states}",
        "A port in INIT waits for a subnet manager: start opensm, or look at the switch's"
        if initialising
        else "`rdma link` and `ibv_devinfo` show it. Bring its interface up (`ip link set DEV up`), look at the cable",
    )


def _has_gid(ground: Ground) -> Step | str:
    found = [(d, p, gid) for d in _active(ground) for p in d.ports if p.active for gid in p.gids]
    if not found:
        names = ", ".join(device.name for device in _active(ground))
        return Step(
            "GID",
            State.MISSING,
            f"no active port of {names} has a GID: peers could not address it",
            "Over Ethernet GIDs come from the addresses of the interface: give it one (`ip addr add`), and bring it up",
        )
    wanted = os.environ.get("MC_GID_INDEX", "")
    if wanted.isdecimal() and not any(gid.index == int(wanted) for _, _, gid in found):
        return Step(
            "GID",
            State.MISSING,
            f"MC_GID_INDEX={wanted}, and no active port has a GID there",
            f"Unset it. There are: {'; '.join(f'{d.name} {gid}' for d, _, gid in found)}",
        )
    return "; ".join(f"{device.name} port {port.number} GID {gid}" for device, port, gid in found)


def _has_permission(ground: Ground) -> Step | str:
    files = {device.name: device.character_device for device in _active(ground)}
    opened, refused = first_opened(files, ground.root)
    return f"{opened} can be opened" if opened else Step("permission", State.MISSING, "; ".join(refused), MAY_BE_OPENED)


def _has_driver(ground: Ground) -> Step | str:
    found = ground.verbs()
    usable = [device.name for device in _active(ground) if device.name in found.devices]
    if usable:
        return f"libibverbs has a driver for {', '.join(usable)}"
    names = ", ".join(device.name for device in _active(ground))
    if "libibverbs" in found.problem:
        return Step(
            "user-space driver",
            State.MISSING,
            f"libibverbs is missing: {found.problem}",
            "Debian and Ubuntu: apt-get install libibverbs1 ibverbs-providers",
        )
    return Step(
        "user-space driver",
        State.MISSING,
        f"libibverbs does not list {names}: its user-space driver is missing"
        + (f" ({found.problem})" if found.problem else ""),
        "Debian and Ubuntu: apt-get install ibverbs-providers (libmlx5, librxe and others); check with `ibv_devices`",
    )


def _has_locked_memory(ground: Ground) -> Step | str:
    if ground.memlock == UNLIMITED or ground.may_lock:
        return "unlimited" if ground.memlock == UNLIMITED else "CAP_IPC_LOCK: the limit does not count"
    if ground.memlock >= NEEDS_LOCKED:
        return f"{in_bytes(ground.memlock)} may be locked; {in_bytes(NEEDS_LOCKED)} are needed with default settings"
    return Step(
        "locked memory",
        State.MISSING,
        f"ulimit -l allows {in_bytes(ground.memlock)}, and pool and staging are pinned: {in_bytes(NEEDS_LOCKED)} with "
        "default settings",
        MAY_BE_LOCKED,
    )


def _has_engine(ground: Ground) -> Step | str:
    if not ground.engines:
        return Step("engine", State.NOT_REACHED)
    installed = {
        name: one
        for name, one in ground.engines.items()
        if one.probe.readiness is not Readiness.UNAVAILABLE or "engine" in one.probe.facts
    }
    if not installed:
        return Step(
            "engine",
            State.MISSING,
            "no engine that can use RDMA is installed",
            "; ".join(f"{name}: {one.probe.hint}" for name, one in ground.engines.items()),
        )
    broken = {name: one for name, one in installed.items() if not one.serves}
    if len(broken) == len(installed):
        return Step(
            "engine",
            State.MISSING,
            "; ".join(f"{name} does not work: {one.refused or one.probe.reason}" for name, one in broken.items()),
            "; ".join(hint for one in broken.values() if (hint := one.hint or one.probe.hint)),
        )
    return ", ".join(
        f"{name} {one.probe.facts.get('engine', '')}".strip() for name, one in installed.items() if one.serves
    )


def _has_word(ground: Ground) -> Step | str:
    serving = {name: one for name, one in ground.engines.items() if one.serves}
    over = [name for name, one in serving.items() if one.path == "rdma"]
    if over:
        return f"{', '.join(over)} {'goes' if len(over) == 1 else 'go'} over it, by the engine's own word"
    return Step(
        "engine's own word",
        State.MISSING,
        "; ".join(f"{name} goes over {one.path}: {one.probe.reason}" for name, one in serving.items()),
        "; ".join(one.probe.hint for one in serving.values() if one.probe.hint),
    )


RUNGS = (
    ("device", _has_device),
    ("port", _has_port),
    ("GID", _has_gid),
    ("permission", _has_permission),
    ("user-space driver", _has_driver),
    ("locked memory", _has_locked_memory),
    ("engine", _has_engine),
    ("engine's own word", _has_word),
)
