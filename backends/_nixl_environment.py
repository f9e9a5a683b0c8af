"""The NIXL engine's environment: what we set before it is loaded, whether it is there, and what it may use.

UCX, the engine under it, takes its settings from variables of the process when a context is made. What we set is in
`SETS`, each with its reason; a value that is there already is the user's and wins.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path

from tensorferry.backends._cma import copy_refused as copy_refused
from tensorferry.backends._cma import ptrace_scope as ptrace_scope
from tensorferry.backends._loader import missing, refused, replace, too_old, useless
from tensorferry.backends._rdma import rdma_ports, why_not_usable
from tensorferry.backends._wheel import brings, why_not_whole
from tensorferry.core.cuda_driver import why_no_cuda
from tensorferry.core.transport import EngineVariable

INSTALL = "pip install 'tensorferry[nixl]'"

MODULES = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
"""The wheels that hold the engine, in the order in which `import nixl` tries them where no CUDA decides."""

MODULES_VARIABLE = "UCX_MODULES"

SETS = (
    EngineVariable(
        MODULES_VARIABLE,
        "^ib",
        "only where there is no RDMA device, or this process may not use one: the InfiniBand modules could do nothing "
        "there, the libraries that they bring crash the process at its exit, and where memory may not be locked they "
        "try again for ever",
    ),
    EngineVariable(
        "UCX_LOG_FILE", "stderr", "UCX writes to standard output otherwise, into whatever the program prints there"
    ),
    EngineVariable("UCX_LOG_LEVEL", "fatal", "a peer that ends is told to the caller, not written to the terminal"),
    EngineVariable(
        "NIXL_LOG_LEVEL", "FATAL", "the same: what fails is raised; `import nixl` writes to standard output otherwise"
    ),
    EngineVariable(
        "UCX_DEBUG_SIGNO", "0", "UCX takes SIGHUP for its debugger otherwise, which then ends the process no more"
    ),
)
"""Variables that opening a nixl transport sets where the user has not."""

OWN_LOCKED = 144 << 20
"""Bytes that UCX itself locks for one agent with two workers, over verbs on a soft-RoCE device: 139 MiB. With less left
it tries for ever."""

RDMA, MEMCPY, TCP = "rdma", "memcpy", "tcp"

UCX_NAMES = {RDMA: "rc, ud, dc", MEMCPY: "cma", TCP: "tcp"}
"""What UCX calls them, as far as NIXL uses it."""

_RDMA_NAMES = frozenset({"ib", "srd", "gga"})
_RDMA_FAMILIES = ("rc", "ud", "dc")
_COPY_NAMES = frozenset({"cma", "shm", "sm"})
"""Names in UCX_TLS. posix, sysv and xpmem are not used by NIXL: they cannot tell a peer's end."""

PACKAGES = {
    "libfabric.so.1": "libfabric1",
    "libhwloc.so.15": "libhwloc15",
    "libnuma.so.1": "libnuma1",
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libcuda.so.1": "the NVIDIA driver",
    "libcudart.so.12": "the CUDA 12 runtime (pip: nvidia-cuda-runtime-cu12)",
    "libcudart.so.13": "the CUDA 13 runtime (pip: nvidia-cuda-runtime)",
    "libcufile.so.0": "CUDA's GPUDirect Storage",
}
"""What holds a library that the engine or one of its plugins may miss: a Debian package, or what it says."""

TOO_OLD = {
    "libfabric.so.1": "NIXL 1.5 needs libfabric 2.7 or later (for its FABRIC_1.10): Debian 12 has 1.17, Debian 13 2.1",
}
"""Libraries of which a system's package may be too old, and what is wanted."""


class Unfit(Exception):
    """The engine cannot be used here: `reason`, and `hint` what would help."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def refuse_dangers() -> None:
    """Raises Unfit for a variable under which UCX aborts the process when it is loaded."""
    told = os.environ.get("UCX_LOG_FILE", "")
    name = told.removeprefix("file:").partition(":")[0]
    if told and name not in ("stdout", "stderr") and (why := _not_writable(name)):
        raise Unfit(
            f"UCX_LOG_FILE={told} is set, which cannot be written to ({why}): UCX aborts the process",
            "Unset UCX_LOG_FILE, or name a file in a folder that this process may write to",
        )


def _not_writable(name: str) -> str:
    path = Path(name.replace("%p", str(os.getpid())).replace("%h", os.uname().nodename))
    if not name or path.is_dir():
        return "it names no file"
    if not path.parent.is_dir():
        return f"{path.parent} is no folder"
    allowed_to = os.access(path, os.W_OK) if path.exists() else os.access(path.parent, os.W_OK | os.X_OK)
    return "" if allowed_to else "no permission"


def prepare() -> None:
    """Set what the user has not set."""
    for variable in sets_here():
        os.environ.setdefault(variable.name, variable.value)


def sets_here() -> tuple[EngineVariable, ...]:
    """What `prepare` sets on this host, where the user has not."""
    modules = _rdma_is_in_vain()
    return tuple(variable for variable in SETS if modules or variable.name != MODULES_VARIABLE)


class SetsHere:
    """`sets_here()` as an attribute of a class: when it is asked for, not when the class is made."""

    def __get__(self, _instance: object, _owner: type) -> tuple[EngineVariable, ...]:
        return sets_here()


def _rdma_is_in_vain() -> bool:
    """Whatever the state of the ports, UCX can do nothing with the devices of this host."""
    ports = rdma_ports()
    return not ports or bool(why_not_usable(ports, OWN_LOCKED)[0])


# ---- the engine's wheel --------------------------------------------------------------------------------------


def module_name() -> str:
    """The package of the engine to load: the one that `import nixl` would take, or has taken. Raises Unfit.

    Two of them in one process would be two engines whose Python types collide.
    """
    for name in MODULES:
        if f"{name}._bindings" in sys.modules:
            return name
    there = [name for name in MODULES if importlib.util.find_spec(name) is not None]
    if not there:
        if name := installed():
            what = f"{name} {version(name)} is installed by halves: its package is not there"
            raise Unfit(what, reinstall())
        raise Unfit("NIXL is not installed", INSTALL)
    wanted = f"nixl_cu{_torch_cuda()}"
    return wanted if wanted in there else there[0]


def _torch_cuda() -> str:
    """The major version of CUDA that the installed torch was built for, or "". Read from its file: no import."""
    try:
        spec = importlib.util.find_spec("torch")
        text = Path(str(spec.origin)).with_name("version.py").read_text(encoding="utf-8") if spec else ""
    except (OSError, ValueError, ImportError):
        return ""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)", text, re.MULTILINE)
    return found[1] if found else ""


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise Unfit(f"the installed {name} is not a package", f"Install it anew: {reinstall()}")
    return Path(places[0])


def binding_file(name: str) -> Path:
    """The engine's extension module. Raises Unfit where this Python has none, or it cannot be whole."""
    found = _distribution(name)
    if found is not None and (lacks := why_not_whole(found)):
        raise Unfit(f"{name} {found.version} is installed by halves: {lacks}", reinstall())
    folder = package_folder(name)
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}-"
    files = sorted(folder.glob("_bindings.*.so"))
    fitting = [file for file in files if tag in file.name or ".abi3." in file.name]
    if not fitting:
        raise Unfit(
            f"the installed {name} has no module for this Python", f"Install it with this Python: {reinstall()}"
        )
    return fitting[0]


def bundled(name: str, pattern: str) -> list[Path]:
    """Libraries that the wheel brought along."""
    return sorted(package_folder(name).with_name(f"{name}.libs").glob(pattern))


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def version(name: str) -> str:
    found = _distribution(name)
    return found.version if found is not None else "unknown"


def installed() -> str:
    """The package of the engine that there is, whole or not; "" for none."""
    if any(importlib.util.find_spec(name) is not None for name in MODULES):
        return module_name()
    return next((name for name in MODULES if _distribution(name) is not None), "")


def reinstall() -> str:
    """What makes the installed engine whole: where it is there, pip's plain answer is that nothing is to be done."""
    found = installed()
    return f"pip install --force-reinstall --no-deps {found.replace('_', '-')}" if found else INSTALL


def _is_brought(library: str) -> bool:
    """The engine's own wheel has it."""
    name = installed()
    found = _distribution(name) if name else None
    return found is not None and brings(found, library)


def lacking(file: Path) -> list[str]:
    """What the system has not, of the libraries in `PACKAGES` that this one names and of those that they need."""
    named = file.read_bytes()
    said = [refused(library) for library in PACKAGES if library.encode() + b"\0" in named]
    return [name for words in said if (name := missing(words))]


def explain_library(text: str, what: str, more: Sequence[str] = ()) -> Unfit:
    """Why a library could not be loaded, from the dynamic loader's own words: what is missing or too old, and who has
    it. The loader names the first one alone; `more`: what else is known to be missing."""
    library, file, wanted = too_old(text)
    if library:
        hint = TOO_OLD.get(library, f"Install a later version of the package that has {library}")
        return Unfit(f"{what} needs {wanted} of {library}, and {file} is older", hint)
    there = useless(text)
    if there and not _is_brought(there):
        package = PACKAGES.get(there, "")
        hint = replace(there, "" if " " in package else package)
        return Unfit(f"{what} needs {there}, which is there and does not load: {text}", hint)
    named = missing(text)
    if not named:
        return Unfit(f"{what} cannot be loaded: {text}", f"Install it anew: {reinstall()}")
    if _is_brought(named):
        return Unfit(f"{what} lacks {named}, which its own wheel brings: it is installed by halves", reinstall())
    libraries = list(dict.fromkeys([named, *more]))
    packages = [PACKAGES[library] for library in libraries if " " not in PACKAGES.get(library, " ")]
    hints = [f"Debian and Ubuntu: apt-get install {' '.join(packages)}"] if packages else []
    hints += [TOO_OLD[library] for library in libraries if library in TOO_OLD]
    for library in libraries:
        if library not in PACKAGES:
            hints.append(f"Install the package that has {library}")
        elif PACKAGES[library] not in packages:
            hints.append(f"{library} is in {PACKAGES[library]}")
    return Unfit(f"{what} needs {', '.join(libraries)}, which this system lacks", "; ".join(hints))


# ---- what UCX may use ----------------------------------------------------------------------------------------


def ways(tls: str) -> frozenset[str]:
    """Which of "rdma", "memcpy" and "tcp" a list of UCX transports (UCX_TLS) lets data take. Empty: all."""
    everything = frozenset({RDMA, MEMCPY, TCP})
    names = [name.strip() for name in tls.strip().lstrip("^").split(",") if name.strip()]
    if not names or "all" in names:
        return everything
    found = {way for name in names if (way := _way(name))}
    return everything - found if tls.strip().startswith("^") else frozenset(found)


def port_range() -> str:
    """The ports that UCX listens on over TCP, as `21000-21050`; "" where it takes any that is free."""
    told = os.environ.get("UCX_TCP_PORT_RANGE", "")
    return told if re.fullmatch(r"[1-9]\d*(-\d+)?", told, re.ASCII) else ""  # 0 is any; it refuses all else


def loads(module: str) -> bool:
    """Whether UCX_MODULES leaves UCX this module: it lists those that are loaded, or behind a ^ those that are not."""
    listed = os.environ.get(MODULES_VARIABLE, "all")
    names = listed.removeprefix("^").split(",")
    return module not in names if listed.startswith("^") else bool({module, "all"} & set(names))


def allowed() -> frozenset[str]:
    """The ways that the user's UCX_TLS and UCX_MODULES leave."""
    found = ways(os.environ.get("UCX_TLS", ""))
    return found if loads("cma") else found - {MEMCPY}


def named_ways(copies_refused: str) -> str:
    """What UCX may use here when nothing is required, by its own names: `cma, tcp`. `copies_refused`: why not CMA."""
    if not why_not_rdma()[0]:
        return UCX_NAMES[RDMA]
    left = allowed() - ({RDMA} if why_never_rdma()[0] else set()) - ({MEMCPY} if copies_refused else set())
    return ", ".join(name for way, name in UCX_NAMES.items() if way in left) or "none"


def refuse_nothing_left(cause: str, remedy: str) -> None:
    """Raises Unfit where the user lets UCX use RDMA alone, and `cause` stands against that."""
    if cause and allowed() == {RDMA}:
        raise Unfit(f"UCX_TLS={os.environ['UCX_TLS']} lets UCX use RDMA alone: {cause}", remedy)


def _way(name: str) -> str:
    plain = name.removeprefix("\\").split(":")[0]
    if plain in _RDMA_NAMES or plain.split("_")[0] in _RDMA_FAMILIES:
        return RDMA
    if plain in _COPY_NAMES:
        return MEMCPY
    return TCP if plain == TCP else ""


def why_not_rdma() -> tuple[str, str]:
    """Why it cannot be said of UCX that it uses RDMA, and what helps. ("", "") where nothing that we can see stands
    against it."""
    cause, remedy = why_never_rdma()
    tls = os.environ.get("UCX_TLS", "")
    if not cause and tls and allowed() != {RDMA}:
        return (
            f"UCX_TLS={tls} lets UCX take another way without saying so",
            "Unset it, or name RDMA alone (UCX_TLS=rc)",
        )
    return cause, remedy


def why_never_rdma() -> tuple[str, str]:
    """Why UCX cannot use RDMA, and what helps. ("", "") where it may, if perhaps among other ways."""
    ports = rdma_ports()
    if not ports:
        return "there is no RDMA device", "Check `ls /sys/class/infiniband`, and that a container is given its devices"
    active = [name for name, up in ports.items() if up]
    if not active:
        return f"no port of {', '.join(ports)} is active", "Check the link: `ibv_devinfo`, `rdma link`"
    tls = os.environ.get("UCX_TLS", "")
    if RDMA not in ways(tls):
        return f"UCX_TLS={tls} leaves RDMA out", "Change or unset UCX_TLS"
    devices = os.environ.get("UCX_NET_DEVICES", "")
    if devices and devices != "all" and not {name.split(":")[0] for name in devices.split(",")} & set(ports):
        return f"UCX_NET_DEVICES={devices} names no RDMA device", f"There are: {', '.join(ports)}"
    cause, remedy = why_not_usable(active, OWN_LOCKED)
    if cause:
        return cause, remedy
    if not loads("ib"):  # after the above, for which `prepare` itself leaves it out
        return f"UCX_MODULES={os.environ[MODULES_VARIABLE]} leaves RDMA out", "Unset UCX_MODULES"
    return "", ""


def why_not_cuda(module: str, backend: str, found: Collection[str]) -> tuple[str, str]:
    """Why this transport does not take CUDA memory, and what helps; ("", "") where nothing that we can see stands
    against it. `found`: the ways that UCX may use.

    Over RDMA alone: what UCX does otherwise (copies through the host over TCP, CUDA's own IPC on one host) is not
    fenced by anything that is known here, and the endpoint's own way through the host is as short as TCP's.
    """
    if backend != "UCX":
        return f"the backend is {backend}", "CUDA memory goes over UCX"
    if set(found) != {RDMA}:
        return "it is taken over RDMA alone", "Rows on a GPU go through host memory"
    cause, remedy = why_no_cuda()
    if cause:
        return cause, remedy
    if not bundled(module, "ucx/libuct_cuda.so*"):
        return f"the UCX of the installed {module} has no CUDA module", f"Install another: {INSTALL}"
    tls = os.environ.get("UCX_TLS", "")
    names = {name.strip().removeprefix("\\") for name in tls.split(",")}
    if tls and (tls.startswith("^") or not names & {"cuda", "cuda_copy", "all"}):
        return f"UCX_TLS={tls} leaves CUDA out", "Add cuda_copy to it, or unset it"
    return "", ""


def said(*names: str) -> dict[str, str]:
    """Those variables that the user has set."""
    ours = {variable.name: variable.value for variable in SETS}
    return {name: os.environ[name] for name in names if os.environ.get(name) not in (None, ours.get(name))}
