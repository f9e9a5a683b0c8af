"""Which room may know which, and what an import may load.

The contracts in pyproject.toml run here as they do in `make imports`; the tests below them say what import-linter
cannot: that no room knows the front door, and what really stands in sys.modules after an import.
"""

from __future__ import annotations

import logging.config
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
ROOMS = ("backends", "conformance", "core", "plugins")
ENGINES = {"etcd3gw", "mooncake", "nixl", "nixl_cu12", "nixl_cu13"}

# The state machines decide, and drivers carry out: no sockets, no threads, no clock, no chance, no tensors.
MACHINES = ("allocator", "ledger", "messages", "receiver", "sender", "wire")
IMPURE = {
    "asyncio",
    "multiprocessing",
    "os",
    "random",
    "secrets",
    "select",
    "socket",
    "threading",
    "time",
    "torch",
    "zmq",
}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "tensorferry", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def room_of(module: str) -> str:
    """The room that a module lies in; "" for the front door, which is all of tensorferry that is no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def inside(graph: grimp.ImportGraph) -> list[str]:
    return sorted(module for module in graph.modules if module.split(".")[0] == "tensorferry")


def loaded_by(*modules: str) -> set[str]:
    """The top-level names in sys.modules of a fresh process that imported these and nothing else."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


def modules_in(room: str) -> list[str]:
    """Every module in a room's folder, by its full name."""
    found = []
    for file in sorted((ROOT / room).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(("tensorferry", *(parts[:-1] if parts[-1] == "__init__" else parts))))
    return found


def test_the_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        logging.config, "dictConfig", lambda config: None
    )  # its own would silence every logger there is
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


def test_no_room_knows_the_front_door(graph: grimp.ImportGraph) -> None:
    wrong = [
        f"{module} -> {imported}"
        for module in inside(graph)
        if room_of(module)
        for imported in graph.find_modules_directly_imported_by(module)
        if imported.split(".")[0] == "tensorferry" and not room_of(imported) and imported != "tensorferry._version"
    ]
    assert wrong == []


def test_only_backends_import_an_engine(graph: grimp.ImportGraph) -> None:
    wrong = [
        f"{module} -> {imported}"
        for module in inside(graph)
        if room_of(module) != "backends"
        for imported in graph.find_modules_directly_imported_by(module) & ENGINES
    ]
    assert wrong == []


def test_only_the_control_channel_and_backends_import_zmq(graph: grimp.ImportGraph) -> None:
    wrong = [
        module
        for module in inside(graph)
        if "zmq" in graph.find_modules_directly_imported_by(module)
        if room_of(module) != "backends" and not f"{module}.".startswith("tensorferry.core.control.")
    ]
    assert wrong == []


@pytest.mark.parametrize("machine", MACHINES)
def test_the_machines_know_no_socket_thread_or_clock(graph: grimp.ImportGraph, machine: str) -> None:
    name = f"tensorferry.core.{machine}"
    assert name in graph.modules, f"{name} is gone; mend MACHINES"
    reached = graph.find_upstream_modules(name) | {name}
    wrong = {
        f"{module} -> {imported}"
        for module in reached
        if module.split(".")[0] == "tensorferry"
        for imported in graph.find_modules_directly_imported_by(module) & IMPURE
    }
    assert wrong == set()


def test_importing_tensorferry_loads_nothing_heavy() -> None:
    heavy = {"numpy", "rich", "safetensors", "stevedore", "tokenizers", "torch", "zmq"} | ENGINES
    assert loaded_by("tensorferry") & heavy == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_loads_nothing_heavy_by_itself(room: str) -> None:
    assert loaded_by(f"tensorferry.{room}") & ({"torch", "zmq", "rich", "stevedore"} | ENGINES) == set()


def test_the_transport_layer_loads_neither_torch_nor_an_engine() -> None:
    loaded = loaded_by("tensorferry.core.transport", *modules_in("backends"))
    assert loaded & ({"torch", "zmq", "rich"} | ENGINES) == set()
