"""A fresh process that imports, or probes, the transport under test and tells what that changed.

`python -m tensorferry.conformance.fresh import|probe TARGET [OPTIONS]`, TARGET an entry point's or a class's
"module:attribute". What it tells is one line of JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import locale
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import IO, Any

ENGINES = frozenset(
    {"mooncake", "nixl", "nixl_cu12", "nixl_cu13", "torch", "ucp", "ucxx", "cupy", "cuda", "pynvml", "mpi4py", "nccl"}
    | {"tensorflow", "jax", "jaxlib", "triton", "ray", "pyverbs", "numpy"}
)
"""What is known to be an engine, or to cost as much as one."""


def state() -> dict[str, Any]:
    """What an import or a probe should leave alone."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        libraries = set(re.findall(r"\s(/\S+\.so[.\d]*)$", maps.read(), re.MULTILINE))
    children = f"/proc/self/task/{threading.get_native_id()}/children"
    with open(children, encoding="ascii") as listed:
        offspring = listed.read().split()
    return {
        "modules": set(sys.modules),
        "libraries": libraries,
        "process": belongings(),
        "environment": dict(os.environ),
        "threads": {thread.name for thread in threading.enumerate()},
        "tasks": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "children": offspring,
    }


SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGCHLD", "SIGALRM", "SIGPIPE", "SIGUSR1", "SIGUSR2", "SIGWINCH")
"""Those that a process uses for itself. Of the others engines may make crash reports."""


def belongings() -> dict[str, str]:
    """What is the process's, by name: a plugin has no business with it."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        status = dict(line.split(":", 1) for line in lines if ":" in line)
    caught, ignored = int(status["SigCgt"], 16), int(status["SigIgn"], 16)
    held = {
        f"the handler of {name}": f"{signal.getsignal(bit + 1)} {caught >> bit & 1}{ignored >> bit & 1}"
        for name, bit in ((name, signal.Signals[name] - 1) for name in SIGNALS)
    }
    root = logging.getLogger()
    return held | {
        "the working directory": os.getcwd(),
        "the umask": status["Umask"],
        "the root logger": f"{root.level} {root.handlers} {root.filters} {logging.root.manager.disable}",
        "logging's classes": f"{logging.getLoggerClass()} {logging.getLogRecordFactory()}",
        "the default time-out of sockets": str(socket.getdefaulttimeout()),
        "sys.excepthook": str(sys.excepthook),
        "threading.excepthook": str(threading.excepthook),
        "sys.stdout and sys.stderr": f"{sys.stdout} {sys.stderr}",
        "the garbage collector": f"{gc.isenabled()} {gc.get_threshold()}",
        "the recursion limit": str(sys.getrecursionlimit()),
        "the switch interval": str(sys.getswitchinterval()),
        "the locale": locale.setlocale(locale.LC_ALL),
        "how processes are started": str(multiprocessing.get_start_method(allow_none=True)),
        "standard output": str(os.fstat(1).st_size),
    }


def differing(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name, value in before.items() if after[name] != value]


def keep_stdout() -> IO[str]:
    """Standard output for this process's own words. What others print goes to a file that `belongings` looks at."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    others = os.memfd_create("standard output")
    os.dup2(others, 1)
    os.close(others)
    return own


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready, and empty where nothing has changed."""
    names = set(before["environment"]) | set(after["environment"])
    changed = sorted(n for n in names if before["environment"].get(n) != after["environment"].get(n))
    return {
        "modules": sorted(after["modules"] - before["modules"]),
        "engines": sorted({m.partition(".")[0] for m in after["modules"] - before["modules"]} & ENGINES),
        "libraries": sorted(lib for lib in after["libraries"] - before["libraries"] if not _standard(lib)),
        "environment": changed,
        "process": differing(before["process"], after["process"]),
        "threads": sorted(after["threads"] - before["threads"]),
        "tasks": after["tasks"] - before["tasks"],
        "descriptors": after["descriptors"] - before["descriptors"],
        "children": [child for child in after["children"] if child not in before["children"]],
    }


def _standard(library: str) -> bool:
    """Of the standard library and what that loads (ssl, sqlite): not of any installed distribution."""
    return "/site-packages/" not in library and "/dist-packages/" not in library


def main() -> int:
    own = keep_stdout()
    what, target = sys.argv[1], sys.argv[2]
    # What tensorferry itself loads for any transport is no cost of this one.
    for name in ("msgspec", "msgspec.msgpack", "msgspec.json", "xxhash", "ctypes", "mmap", "socket", "logging"):
        importlib.import_module(name)
    for name in ("core.errors", "core.memory", "core.transport", "plugins.registry"):
        importlib.import_module(f"tensorferry.{name}")
    module, _, attribute = target.partition(":")
    before = state()
    begun, worked = time.monotonic(), time.process_time()
    told: dict[str, Any] = {}
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        if what == "probe":
            before = state()
            begun, worked = time.monotonic(), time.process_time()
            answer = found.probe()
            told["answer"] = f"{type(answer).__module__}.{type(answer).__name__}"
            told["readiness"] = str(getattr(answer, "readiness", ""))
            told["facts"] = all(isinstance(x, str) for pair in dict(answer.facts).items() for x in pair)
            told["reason"] = bool(answer.reason)
    except BaseException as error:  # noqa: BLE001 - SystemExit too: it is what is told
        told["raised"] = f"{type(error).__name__}: {error}"
    told["seconds"] = time.monotonic() - begun
    told["cpu"] = time.process_time() - worked
    sys.stdout.flush()
    if what == "probe":
        time.sleep(0.2)  # threads that are on their way out
    json.dump(told | changes(before, state()), own)
    own.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
