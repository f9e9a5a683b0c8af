"""What this host is, as far as it matters to moving bytes: read from /proc and /sys, and tried where they do not say.

Everything takes `root`, so that another host's files can be read as well.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ifaddr

from tensorferry.backends._rdma import ROOT as ROOT
from tensorferry.backends._rdma import UNLIMITED as UNLIMITED
from tensorferry.backends._rdma import may_lock as may_lock
from tensorferry.backends._rdma import memlock as memlock
from tensorferry.commands.carry_view import in_bytes
from tensorferry.commands.findings import Finding, Severity
from tensorferry.core.settings import Settings

IRRELEVANT = {
    "size of /dev/shm": "shm's memory is a memfd, which is not there. UCX, under nixl, has to be able to write there, "
    "whatever the size",
    "clocks of two hosts": "nothing compares them: every deadline is measured by one host's own",
}
"""What is often asked for and is not looked at, with the reason."""


def text(path: Path) -> str:
    """A file of /proc or /sys; empty where there is none, or it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Interface:
    name: str
    addresses: tuple[str, ...]
    """With the length of the prefix: 10.0.0.5/24."""
    mtu: int
    state: str
    """As the kernel says: up, down, unknown (loopback)"""

    def __str__(self) -> str:
        return f"{', '.join(self.addresses) or 'no address'}; MTU {self.mtu}, {self.state}"


def interfaces(root: Path = ROOT) -> list[Interface]:
    held: dict[str, list[str]] = {}
    with suppress(OSError):
        for adapter in ifaddr.get_adapters(include_unconfigured=True):
            for ip in adapter.ips:
                address = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
                held.setdefault(str(adapter.nice_name), []).append(f"{address}/{ip.network_prefix}")
    folder = root / "sys/class/net"
    names = sorted({path.name for path in folder.glob("*") if path.is_dir()} | held.keys())
    return [
        Interface(
            name,
            tuple(held.get(name, ())),
            int(text(folder / name / "mtu") or 0),
            text(folder / name / "operstate") or "unknown",
        )
        for name in names
    ]


def interface_addresses() -> dict[str, list[str]]:
    """The addresses of each interface, without prefixes."""
    return {one.name: [address.partition("/")[0] for address in one.addresses] for one in interfaces()}


def facts(root: Path = ROOT) -> dict[str, str]:
    """The host in a few words each, by name."""
    memory = _meminfo(root)
    limit = memory_limit(root)
    told = {
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": f"{usable_cpus(root):g} of {os.cpu_count() or 1} usable",
        "memory": f"{in_bytes(memory.get('MemTotal', 0))}, {in_bytes(memory.get('MemAvailable', 0))} available"
        + (f"; the control group allows {in_bytes(limit)}" if limit else ""),
        "huge pages": f"transparent: {_chosen(text(root / 'sys/kernel/mm/transparent_hugepage/enabled')) or 'none'}; "
        f"reserved: {memory.get('HugePages_Total', 0)}, {memory.get('HugePages_Free', 0)} of them free",
        "locked memory (ulimit -l)": _told(memlock(), "bytes") + ("; CAP_IPC_LOCK" if may_lock(root) else ""),
        "open files (ulimit -n)": _told(resource.getrlimit(resource.RLIMIT_NOFILE)[0], ""),
        "container": container(root),
        "namespaces": ", ".join(f"{kind} {_namespace(root, kind)}" for kind in ("net", "pid", "ipc", "user")),
        "user": f"{os.getuid()}",
        "GPUs": ", ".join(gpus(root)) or "none (no NVIDIA driver is loaded)",
        "GPU memory over RDMA": peer_memory(root),
    }
    return told | {f"interface {one.name}": str(one) for one in interfaces(root)}


def findings(root: Path = ROOT, cma: Finding | None = None, settings: Settings | None = None) -> list[Finding]:
    """What of it deserves a word, and what of it these settings exceed."""
    found = [cma or copy_between_processes(root)]
    limit = min([n for n in (memory_limit(root), _meminfo(root).get("MemTotal", 0)) if n] or [0])
    if limit and settings is not None and settings.destination_budget > limit:
        found.append(
            Finding(
                Severity.NOTE,
                "memory",
                f"destination_budget ({in_bytes(settings.destination_budget)}) exceeds the memory there is "
                f"({in_bytes(limit)})",
                "Set destination_budget to what a language side may use here: larger rooms then wait, or are refused",
            )
        )
    if not (root / "proc/self").exists():
        what = "/proc is not mounted: limits of control groups, capabilities and the memory there is are not known"
        found.append(Finding(Severity.WARNING, "proc", what, "`mount -t proc proc /proc`"))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < 1024:
        found.append(
            Finding(Severity.WARNING, "open files", f"ulimit -n is {files}: sockets may run out", "Raise it to 65536")
        )
    if usable_cpus(root) < 2:
        found.append(
            Finding(
                Severity.NOTE, "cpus", "one processor: a transfer and its gather take turns", "Give it two, or use RDMA"
            )
        )
    if any(one.name == "lo" and one.state == "down" for one in interfaces(root)):
        found.append(
            Finding(
                Severity.WARNING,
                "network",
                "loopback is down: engines talk to themselves over it, and so do two processes of this host",
                "`ip link set lo up`",
            )
        )
    if all(one.name == "lo" or not one.addresses or one.state == "down" for one in interfaces(root)):
        found.append(Finding(Severity.NOTE, "network", "no interface but loopback is up: peers on this host only", ""))
    return found


# ---- one by one ----------------------------------------------------------------------------------------------


def memory_limit(root: Path = ROOT) -> int:
    """The least limit of this process's control groups, in bytes; 0 for none. Version 1 and 2."""
    limits = []
    for line in text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / path.strip("/")
        while folder.is_relative_to(base):  # a group is bound by those above it; inside a container they are not seen
            value = text(folder / name)
            if value.isdecimal() and int(value) < 1 << 60:  # version 1 writes "unlimited" as a number near 2**63
                limits.append(int(value))
            folder = folder.parent
    return min(limits, default=0)


def usable_cpus(root: Path = ROOT) -> float:
    """Processors that this process may run on, less what a quota of its control group takes."""
    count = float(len(os.sched_getaffinity(0)))
    quota, _, period = text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        count = min(count, int(quota) / int(period))
    return count


def container(root: Path = ROOT) -> str:
    """What speaks for one. Nothing proves that there is none."""
    signs = [name for name in (".dockerenv", "run/.containerenv") if (root / name).exists()]
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        signs.append("KUBERNETES_SERVICE_HOST")
    if (mapped := text(root / "proc/self/uid_map").split()) and mapped != ["0", "0", "4294967295"]:
        signs.append("user namespace")
    return f"yes, by {', '.join(signs)}" if signs else "no sign of one"


def gpus(root: Path = ROOT) -> list[str]:
    """NVIDIA's, as the driver lists them."""
    cards = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    models = [re.search(r"^Model:\s*(.+)$", text(card), re.MULTILINE) for card in cards]
    return [found[1] for found in models if found]


def peer_memory(root: Path = ROOT) -> str:
    """Whether a network card can reach the memory of a GPU."""
    for module in ("nvidia_peermem", "nv_peer_mem"):
        if (root / "sys/module" / module).exists():
            return f"{module} is loaded"
    if not (root / "proc/driver/nvidia/version").exists():
        return "no GPU, nothing to do"
    return "nvidia_peermem is not loaded; engines that use DMA-BUF (Linux 5.12, open kernel modules) do without"


_HOLDER = """
import ctypes, os, sys
words = ctypes.create_string_buffer(b"tensorferry")
print(os.getpid(), ctypes.addressof(words), flush=True)
sys.stdin.read()
"""

_READER = """
import ctypes, os, sys
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
libc = ctypes.CDLL(None, use_errno=True)
read = libc.process_vm_readv
read.restype = ctypes.c_ssize_t
read.argtypes = [ctypes.c_int] + [ctypes.POINTER(Iovec), ctypes.c_ulong] * 2 + [ctypes.c_ulong]
mine = ctypes.create_string_buffer(11)
ours, theirs = Iovec(ctypes.addressof(mine), 11), Iovec(int(sys.argv[2]), 11)
count = read(int(sys.argv[1]), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
print("yes" if count == 11 and mine.raw == b"tensorferry" else os.strerror(ctypes.get_errno()))
"""


def _read_sibling(seconds: float = 10.0) -> str:
    """Whether one process can read another of the same user that is not its child: "yes", or what the kernel says."""
    quick = [sys.executable, "-I", "-S", "-c"]
    try:
        with subprocess.Popen([*quick, _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            try:
                where = holder.stdout.readline().split()
                done = subprocess.run(
                    [*quick, _READER, *where], capture_output=True, text=True, timeout=seconds, check=False
                )
            finally:
                holder.kill()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip() or (done.stderr.strip().splitlines() or ["no answer"])[-1]


def copy_between_processes(root: Path = ROOT, attempt: str | None = None) -> Finding:
    """CMA: process_vm_readv, tried between two processes of ours of which neither is the other's parent."""
    said = attempt if attempt is not None else _read_sibling()
    scope = text(root / "proc/sys/kernel/yama/ptrace_scope")
    yama = f"Yama's ptrace_scope is {scope}" if scope else "no Yama"
    if said == "yes":
        return Finding(Severity.OK, "cma", f"processes of one user can copy from each other ({yama})")
    remedy = "In a container: --cap-add=SYS_PTRACE, and a seccomp profile that allows process_vm_readv"
    if scope not in ("", "0"):
        remedy = f"`sysctl kernel.yama.ptrace_scope=0`, or CAP_SYS_PTRACE. {remedy}"
    return Finding(
        Severity.NOTE,
        "cma",
        f"a process cannot copy from another one of the same user: {said} ({yama}). shm does not need it; "
        "NIXL's UCX does for its fastest way on one host",
        remedy,
    )


def _meminfo(root: Path) -> dict[str, int]:
    """In bytes; counts of huge pages as they are."""
    found = {}
    for line in text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        number, *unit = rest.split()
        found[name] = int(number) * (1024 if unit == ["kB"] else 1)
    return found


def _chosen(setting: str) -> str:
    """`always [madvise] never`: the one in brackets."""
    found = re.search(r"\[(\w+)\]", setting)
    return found[1] if found else ""


def _namespace(root: Path, kind: str) -> str:
    try:
        return re.sub(r"\D", "", os.readlink(root / "proc/self/ns" / kind))
    except OSError:
        return "unknown"


def _told(limit: int, unit: str) -> str:
    if limit in (UNLIMITED, resource.RLIM_INFINITY):
        return "unlimited"
    return in_bytes(limit) if unit else str(limit)


def networks(found: Sequence[Interface]) -> list[str]:
    """The networks that this host is in, loopback and link-local ones left out: 10.0.0.0/24."""
    import ipaddress

    nets = []
    for one in found:
        for address in one.addresses:
            with suppress(ValueError):
                interface = ipaddress.ip_interface(address)
                if not (interface.ip.is_loopback or interface.ip.is_link_local or one.state == "down"):
                    nets.append(str(interface.network))
    return list(dict.fromkeys(nets))
