"""The Mooncake engine's environment: what we set before its import, what we refuse, whether its libraries are there.

The engine takes most of its settings from variables of the process and reads some of them at each transfer. What we
set is in `SETS`, each with its reason; a value that is there already is the user's and wins.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import PathFinder

from tensorferry.backends._loader import missing as missing_library
from tensorferry.backends._loader import refused, replace, too_old, useless
from tensorferry.backends._rdma import rdma_ports as rdma_ports
from tensorferry.backends._rdma import why_not_usable as why_not_usable
from tensorferry.backends._variables import left_as_found
from tensorferry.backends._wheel import brings, why_not_whole
from tensorferry.core.cuda_driver import why_no_cuda
from tensorferry.core.transport import EngineVariable

log = logging.getLogger("tensorferry.backends.mooncake")

MINIMUM = (0, 3, 13)
"""The first release with the fixes that this transport counts on: the engine's server checks each address that a peer
names against what is registered, and a write is complete when the peer has acknowledged it."""

INSTALL = "pip install 'tensorferry[mooncake-cpu]' (without CUDA) or 'tensorferry[mooncake]' (with CUDA 12)"

DISTRIBUTIONS = (
    "mooncake-transfer-engine-non-cuda",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
)

LIBRARIES = {
    "libibverbs.so.1": "libibverbs1",
    "libcurl.so.4": "libcurl4",
    "libnuma.so.1": "libnuma1",
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
}
"""What the wheels expect of the system (their NEEDED entries, less what they bring themselves), and the Debian package
that has it."""

DEFAULT_PORTS = (15000, 17000)
DEFAULT_PROGRESS_S = 10
DEFAULT_TRANSFER_S = 30


FORCE_TCP = "MC_FORCE_TCP"
PROGRESS = "MC_TCP_PROGRESS_TIMEOUT_SEC"
TRANSFER = "MC_TRANSFER_TIMEOUT"

SETS = (
    EngineVariable("MC_LOG_LEVEL", "ERROR", "the engine writes every step to standard error; its errors are kept"),
    EngineVariable(
        PROGRESS,
        str(DEFAULT_PROGRESS_S),
        "a write to a process that is stopped ends after so many seconds without progress, not after 30; "
        "from the option progress_timeout",
    ),
    EngineVariable(
        TRANSFER,
        str(DEFAULT_TRANSFER_S),
        "has to be above MC_TCP_PROGRESS_TIMEOUT_SEC: a transfer that is given up while the engine still reads its "
        "source would send bytes that were put there later; from the option transfer_timeout",
    ),
)
"""Variables that opening a mooncake transport sets where the user has not."""

_REFUSES = {
    "MC_LOG_DIR": "set from Python it aborts the process (the engine's logging is initialized twice)",
    "MC_DISABLE_METACACHE": "each submit would ask the peer again, which can block every transfer for a minute",
}


CHOOSES = (
    "MC_FORCE_TCP", "MC_FORCE_HCA", "MC_TE_FILTERS", "MC_GID_INDEX", "MC_IB_PORT", "MC_USE_IPV6", "WITH_NVIDIA_PEERMEM",
    "MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT", "MC_MIN_PRC_PORT", "MC_MAX_PRC_PORT",
)  # fmt: skip
"""The user's variables that decide about the way that bytes take, and the ports: the probe shows those that are set."""

DMA_BUF = "WITH_NVIDIA_PEERMEM=0 makes the engine use it"
"""By default it registers GPU memory as if a peer-memory module were loaded, and fails where none is."""

EXPOSURE = {
    "listens": "on all interfaces, for anybody who can connect",
    "authentication": "none: whoever can connect reads and writes all registered memory",
    "binding": "not offered: MC_TCP_BIND_ADDRESS and MC_RDMA_BIND_ADDRESS only change what peers are told",
}
"""The handshake binds INADDR_ANY (findAvailableTcpPort, startDaemon) and the data port [::] with IPv4 (TcpContext), and
neither reads an option. MC_TCP_BIND_ADDRESS is not even read in P2P mode, which is ours; MC_RDMA_BIND_ADDRESS names
the address in the paths of NICs."""


def port_range() -> str:
    """From where the engine draws its ports, as `15000-17000`.

    It takes what it is told where both ends are ports above 1023 and outside those that Linux gives to clients by
    default, and in order (ValidatePortRange); else its own range. It reads numbers as C does: what follows the digits
    does not matter, and no digits are 0.
    """
    first, last = (_port(end, default) for end, default in zip(("MIN", "MAX"), DEFAULT_PORTS, strict=True))
    taken = all(1024 <= port <= 65535 and not 32768 <= port <= 60999 for port in (first, last)) and first <= last
    return "-".join(map(str, (first, last) if taken else DEFAULT_PORTS))


def _port(end: str, default: int) -> int:
    for name in (f"MC_{end}_RPC_PORT", f"MC_{end}_PRC_PORT"):  # it reads the second where the first is not there
        if name in os.environ:
            return _as_c_reads(os.environ[name])
    return default


def _as_c_reads(text: str) -> int:
    """atoi"""
    found = re.match(r"\s*([+-]?\d+)", text, re.ASCII)
    return int(found[1]) if found else 0


def lanes() -> int:
    """How many TCP connections the engine keeps to one peer."""
    text = os.environ.get("MC_TCP_LANES_PER_PEER", os.environ.get("MC_TCP_MAX_CONNECTIONS_PER_PEER", ""))
    return int(text) if text.isdecimal() and 1 <= int(text) <= 16 else 4


class Unfit(Exception):
    """The engine cannot be used here: `reason`, and `hint` what would help."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


_ours: dict[str, str] = {}


def refuse_dangers() -> None:
    """Raises Unfit for variables under which the engine aborts, blocks or reports what is not true."""
    for name, why in _REFUSES.items():
        if os.environ.get(name):
            raise Unfit(f"{name} is set: {why}", f"Unset {name}")
    if "MC_FORCE_HCA" in os.environ and FORCE_TCP not in os.environ:
        if not (ports := rdma_ports()):
            raise Unfit(
                "MC_FORCE_HCA is set and there is no RDMA device: the engine does not start", "Unset MC_FORCE_HCA"
            )
        cause, remedy = why_not_usable(ports)
        if cause:
            raise Unfit(f"MC_FORCE_HCA is set and no RDMA device can be used: {cause}", remedy)
    if os.environ.get("MC_TCP_PROTO") == "1":
        raise Unfit(
            "MC_TCP_PROTO=1 is set: the engine then calls a write complete that the peer has not acknowledged",
            "Unset MC_TCP_PROTO",
        )
    if os.environ.get("MC_TCP_ENABLE_CONNECTION_POOL", "").lower() in ("0", "false", "no"):
        raise Unfit(
            "MC_TCP_ENABLE_CONNECTION_POOL is off: each submit would connect anew and block for as long as that takes",
            "Unset MC_TCP_ENABLE_CONNECTION_POOL",
        )


def prepare(progress_s: int = DEFAULT_PROGRESS_S, transfer_s: int = DEFAULT_TRANSFER_S) -> tuple[float, float]:
    """Set what the user has not set; returns the progress and the transfer time-out that hold, in seconds.

    Warns, naming the variable, where the environment overrules an option or its values are unsound together.
    """
    wanted = {PROGRESS: str(progress_s), TRANSFER: str(transfer_s)}
    defaults = {variable.name: variable.value for variable in SETS}
    for name, default in defaults.items():
        value = wanted.get(name, default)
        there = os.environ.get(name)
        if there is None:
            os.environ[name] = _ours[name] = value
        elif there != value and value != default:
            whose = "by an earlier mooncake transport of this process" if _ours.get(name) == there else "already"
            log.warning("%s=%s is set %s and counts for the whole process; the option %s is not used",
                        name, there, whose, value)  # fmt: skip
    if unsound := why_unsound():
        log.warning("%s", unsound)
    return time_outs()


def time_outs() -> tuple[float, float]:
    """The progress and the transfer time-out that hold, or would once a transport is opened, in seconds. Of the latter
    the engine makes a whole number (no digits are 0) and at least 5."""
    try:
        progress = float(os.environ.get(PROGRESS, DEFAULT_PROGRESS_S))
    except ValueError:
        progress = 30.0  # the engine's own
    return progress, float(max(5, _as_c_reads(os.environ.get(TRANSFER, str(DEFAULT_TRANSFER_S)))))


def why_unsound() -> str:
    """What is wrong with the two time-outs together; "" where nothing is."""
    progress, transfer = time_outs()
    if progress < transfer:
        return ""
    return (
        f"{PROGRESS} ({progress:g} s) is not below {TRANSFER} ({transfer:g} s): a write over TCP that is given up may "
        "still be read from its source; its memory is kept until the engine has ended it"
    )


@contextmanager
def prepared_for_now() -> Iterator[None]:
    """`prepare`, undone at the end: the engine takes up some variables when it is imported."""
    try:
        with left_as_found(SETS):
            prepare()
            yield
    finally:
        for name in [name for name in _ours if name not in os.environ]:
            del _ours[name]


def installed_version() -> str:
    """The installed engine's version; "" where there is none. Does not import it."""
    found = _distribution()
    return found.version or "" if found else ""


def _distribution() -> metadata.Distribution | None:
    for name in DISTRIBUTIONS:
        try:
            return metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def reinstall() -> str:
    """What makes the installed engine whole: where it is there, pip's plain answer is that nothing is to be done."""
    found = _distribution()
    return f"pip install --force-reinstall --no-deps {found.name}" if found else INSTALL


def _is_brought(library: str) -> bool:
    """The engine's own wheel has it."""
    found = _distribution()
    return found is not None and brings(found, library)


def check_installed() -> str:
    """The engine's version. Raises Unfit where it is missing, not whole or too old."""
    version = installed_version()
    if not version:
        raise Unfit("the Mooncake transfer engine is not installed", INSTALL)
    package = importlib.util.find_spec("mooncake")
    if package is None or not PathFinder.find_spec("mooncake.engine", package.submodule_search_locations):
        lacks = "package" if package is None else "engine"
        raise Unfit(f"Mooncake {version} is installed by halves: its {lacks} is not there", reinstall())
    found = _distribution()
    if found is not None and (lacks := why_not_whole(found)):
        raise Unfit(f"Mooncake {version} is installed by halves: {lacks}", reinstall())
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < MINIMUM:
        least = ".".join(map(str, MINIMUM))
        raise Unfit(
            f"Mooncake {version} is installed, and {least} is the first release with fixes that safety needs",
            f"Install that or a later one: {INSTALL}",
        )
    return version


def is_cpu_build() -> bool:
    """The build without CUDA is installed."""
    try:
        metadata.version(DISTRIBUTIONS[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def why_not_cuda(protocol: str) -> tuple[str, str]:
    """Why this transport does not take CUDA memory over `protocol`, and what helps; ("", "") where nothing that we can
    see stands against it.

    Over RDMA alone: over TCP the engine copies through host memory of its own, by a stream that ours are not in order
    with, and the endpoint's way through the host is as short.
    """
    if is_cpu_build():
        return (
            "this is the engine's build without CUDA",
            f"pip uninstall {DISTRIBUTIONS[0]}; pip install 'tensorferry[mooncake]'",
        )
    if protocol != "rdma":
        return "it is taken over RDMA alone", "Rows on a GPU go through host memory"
    return why_no_cuda()


def check_libraries() -> None:
    """Raises Unfit where a system library is missing or does not load. Does not import the engine."""
    for library in LIBRARIES:
        if words := refused(library):
            raise explain_import(ImportError(words))


def explain_import(error: ImportError) -> Unfit:
    """Why `import mooncake.engine` failed, naming every system library that is missing and its Debian package."""
    text = str(error)
    library, file, version = too_old(text)
    if library:
        what = f"the Mooncake engine needs {version} of {library}, and {file} is older"
        return Unfit(what, f"Install a later version of the package that has {library}")
    said = [text, *filter(None, map(refused, LIBRARIES))]
    missing = {name for words in said if (name := missing_library(words))}
    if not missing:
        for words in said:
            name = useless(words)
            if name and not _is_brought(name):
                what = f"the Mooncake engine needs {name}, which is there and does not load: {words}"
                return Unfit(what, replace(name, LIBRARIES.get(name, "")))
        return Unfit(f"the Mooncake engine cannot be imported: {text}", f"Install it anew: {reinstall()}")
    brought = sorted(filter(_is_brought, missing))
    if brought:
        what = f"the Mooncake engine lacks {', '.join(brought)}, which its own wheel brings: it is installed by halves"
        return Unfit(what, reinstall())
    cuda = sorted(name for name in missing if name.startswith(("libcuda", "libcudart", "libnvidia")))
    if cuda:
        return Unfit(
            f"the CUDA build of the Mooncake engine is installed and {', '.join(cuda)} is missing",
            "Without CUDA: pip uninstall mooncake-transfer-engine; pip install 'tensorferry[mooncake-cpu]'",
        )
    packages = sorted(LIBRARIES.get(name, "") for name in missing)
    names = ", ".join(sorted(missing))
    known = " ".join(package for package in packages if package)
    return Unfit(
        f"the Mooncake engine needs {names}, which this system lacks",
        f"Debian and Ubuntu: apt-get install {known}" if known else "Install the package that has it",
    )


def why_not_rdma(device: str = "") -> tuple[str, str]:
    """Why the engine would run over TCP, and what helps. ("", "") where nothing that we can see stands against RDMA."""
    if FORCE_TCP in os.environ:
        return "MC_FORCE_TCP is set", "Unset MC_FORCE_TCP"
    devices = rdma_ports()
    wanted = [name for name in device.split(",") if name]
    if not devices:
        return "there is no RDMA device", "Check `ls /sys/class/infiniband`, and that a container is given its devices"
    unknown = [name for name in wanted if name not in devices]
    if unknown:
        return f"there is no RDMA device {', '.join(unknown)}", f"There are: {', '.join(devices)}"
    inactive = [name for name in wanted or devices if not devices[name]]
    if len(inactive) == len(wanted or devices):
        return f"no port of {', '.join(inactive)} is active", "Check the link: `ibv_devinfo`, `rdma link`"
    active = [name for name in wanted or devices if devices[name]]
    filters = os.environ.get("MC_TE_FILTERS", "")
    if filters:
        active = [name for name in active if name in filters.split(",")]
    if not active:
        return f"MC_TE_FILTERS={filters} leaves no active device", "Change or unset MC_TE_FILTERS"
    return why_not_usable(active)


@contextmanager
def without_vain_devices() -> Iterator[None]:
    """For the start of an engine: it takes TCP where this process cannot use the devices that there are. By itself it
    would take one for which no memory can be locked, and then refuse every registration."""
    ports = rdma_ports()
    if ports and FORCE_TCP not in os.environ and why_not_usable(ports)[0]:
        os.environ[FORCE_TCP] = "1"
        try:
            yield
        finally:
            os.environ.pop(FORCE_TCP, None)
    else:
        yield
