"""A fresh process that opens the transport under test: to see what it loads, or what it does where that is refused.

`python -m tensorferry.conformance.without open|exit CLASS SPEC [REFUSED]`. `open` ends the process at once, `exit` as a
program ends. CLASS: the class's "module:attribute". SPEC: what
opens it, as JSON. REFUSED, JSON as well: names of modules that are not there, and of libraries that cannot be loaded.
What it tells is one line of JSON. A module is refused as one that is not installed: no finder knows it, nor its
distribution. A library is one that ctypes is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from tensorferry.conformance.fresh import belongings, differing, keep_stdout
from tensorferry.conformance.target import Spec, Target, resolve
from tensorferry.core.errors import FerryError
from tensorferry.core.memory import host_memory
from tensorferry.core.transport import Copy, RemoteRegion, Status

OURS = frozenset({"tensorferry", "msgspec", "xxhash", "zmq"})
"""tensorferry and what it cannot do without."""


class Refused(msgspec.Struct, frozen=True):
    """What cannot be loaded. Empty: everything can."""

    modules: list[str] = []
    libraries: list[str] = []


class Filter:
    """A finder that does not know what is refused."""

    def __init__(self, inner: Any, refused: Refused, files: frozenset[str]) -> None:
        self._inner = inner
        self._modules = frozenset(refused.modules)
        self._distributions = files

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self._modules:
            return None
        return self._inner.find_spec(name, path, target)

    def find_distributions(self, *arguments: Any) -> Iterable[importlib.metadata.Distribution]:
        find = getattr(self._inner, "find_distributions", None)
        for found in find(*arguments) if find is not None else ():
            if found.metadata["Name"] not in self._distributions:
                yield found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def refuse(refused: Refused) -> None:
    """From now on, in this process."""
    owners = importlib.metadata.packages_distributions()
    hidden = frozenset(name for module in refused.modules for name in owners.get(module, ()))
    sys.meta_path[:] = [Filter(finder, refused, hidden) for finder in sys.meta_path]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "ctypes.dlopen" and arguments[0] in refused.libraries:
            raise OSError(f"{arguments[0]}: cannot open shared object file: No such file or directory")

    sys.addaudithook(hook)


def mapped() -> set[str]:
    """Names of the libraries that this process has."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return {os.path.basename(path) for path in re.findall(r"\s(/\S+\.so[.\d]*)$", maps.read(), re.MULTILINE)}


def write(target: Target) -> str:
    """Open two, and write a byte from one to the other: the outcome in a word."""
    owner, writer = target.open(), target.open()
    region = owner.register(owner.allocate(64))
    memory = writer.allocate(64) if writer.capabilities.registers_sources else host_memory(64)
    source = writer.register(memory) if writer.capabilities.registers_sources else memory
    peer = writer.connect(owner.describe())
    handle = writer.post(peer, [Copy(source, 0, RemoteRegion(region.id, region.generation), 0, 1)])
    while (status := writer.poll(handle)) is Status.PENDING:
        pass
    writer.close()
    owner.close()
    return status.name


def main() -> int:
    own = keep_stdout()
    path, spec = sys.argv[2], msgspec.json.decode(sys.argv[3], type=Spec)
    refused = msgspec.json.decode(sys.argv[4], type=Refused) if len(sys.argv) > 4 else Refused()
    asked: list[str] = []
    sys.addaudithook(lambda event, arguments: asked.append(str(arguments[0])) if event == "ctypes.dlopen" else None)
    module, _, attribute = path.partition(":")
    cls: Any = importlib.import_module(module)
    for part in attribute.split("."):
        cls = getattr(cls, part)
    target = resolve(spec.name, spec.options)
    if refused.modules or refused.libraries:
        refuse(refused)
    before, libraries, environment, process = set(sys.modules), mapped(), dict(os.environ), belongings()
    del asked[:]
    told: dict[str, Any] = {"sets": [variable.name for variable in cls.sets]}
    try:
        answer = cls.probe()
        told |= {"usable": bool(answer.usable), "reason": str(answer.reason), "probe": str(answer.readiness)}
    except Exception as error:  # noqa: BLE001 - told
        told["probe_raised"] = f"{type(error).__name__}: {error}"
    try:
        told["ended"] = write(target)
    except FerryError as error:
        told |= {"ferry": type(error).__name__, "cause": str(error)}
    except Exception as error:  # noqa: BLE001 - told
        told["raised"] = f"{type(error).__name__}: {error}"
    known = OURS | {module.partition(".")[0]} | sys.stdlib_module_names
    tops = {name.partition(".")[0] for name in set(sys.modules) - before}
    told["modules"] = sorted(name for name in tops - known if not name.startswith("_"))
    told["libraries"] = sorted({name for name in asked if name != "None" and os.path.basename(name) not in libraries})
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    told["environment"] = {name: environment.get(name) is not None for name in sorted(changed)}
    sys.stdout.flush()
    told["process"] = differing(process, belongings())
    json.dump(told, own)
    own.flush()
    if sys.argv[1] == "open":
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
