"""Guards for the house itself: what is packaged, what is committed, and what no file in it may do."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("backends", "conformance", "core", "plugins")
SHIPPED = (*ROOMS, "src/tensorferry")
MAX_LINES = 400


@cache
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@cache
def committed() -> dict[str, str]:
    """Every file that git knows, with its mode."""
    done = subprocess.run(["git", "ls-files", "-s", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs git-checkout: {done.stderr.strip()}")
    rows = (row.partition("\t") for row in done.stdout.split("\0") if row)
    return {name: info.split()[0] for info, _, name in rows if (ROOT / name).exists()}


def sources(*folders: str) -> list[Path]:
    """Every Python file that really lies in these folders; the links in src/tensorferry are not followed."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py") if not linked(file))


def linked(file: Path) -> bool:
    return any(parent.is_symlink() for parent in file.parents if parent.is_relative_to(ROOT))


def trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for file in sources(*folders):
        yield str(file.relative_to(ROOT)), ast.parse(file.read_text(), filename=str(file))


# ---------------------------------------------------------------- packaging


def folders_with_code() -> dict[str, str]:
    """Package name -> folder, for every folder that holds Python files."""
    found = {}
    for file in sources(*SHIPPED):
        folder = file.parent.relative_to(ROOT)
        name = folder.relative_to("src") if folder.parts[0] == "src" else Path("tensorferry") / folder
        found[".".join(name.parts)] = str(folder)
    return found


def test_the_list_of_packages_is_the_folders_on_disk() -> None:
    # A folder that is not listed would be left out of the wheel without a word.
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(folders_with_code())


def test_every_folder_with_code_is_a_package() -> None:
    bare = [folder for folder in folders_with_code().values() if not (ROOT / folder / "__init__.py").exists()]
    assert bare == []


def test_each_room_is_mapped_to_its_folder() -> None:
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    assert mapping == {"": "src", **{f"tensorferry.{room}": room for room in ROOMS}}


def test_every_data_file_is_shipped() -> None:
    # Patterns are relative to a package's own folder, so a file below it in a folder without code is not reached.
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["*"]
    packages = set(folders_with_code().values())
    left_out = [
        name
        for name, mode in committed().items()
        if name.startswith(tuple(f"{folder}/" for folder in SHIPPED)) and mode != "120000" and not name.endswith(".py")
        if str(Path(name).parent) not in packages or not any(fnmatch.fnmatch(Path(name).name, p) for p in patterns)
    ]
    assert left_out == []


def test_the_four_links_are_links_in_git() -> None:
    links = {name: (ROOT / name).readlink() for name, mode in committed().items() if mode == "120000"}
    assert links == {f"src/tensorferry/{room}": Path(f"../../{room}") for room in ROOMS}


def test_no_room_can_be_imported_under_its_bare_name(tmp_path: Path) -> None:
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-c", code, *ROOMS], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_rooms_are_imported_from_this_checkout() -> None:
    import tensorferry.core

    assert Path(tensorferry.core.__file__).resolve() == ROOT / "core" / "__init__.py"


def test_the_version_is_the_same_everywhere() -> None:
    from tensorferry._version import __version__

    assert importlib.metadata.version("tensorferry") == __version__
    import tensorferry

    assert tensorferry.__version__ == __version__


def test_every_transport_that_is_advertised_loads() -> None:
    points = [
        p for p in importlib.metadata.entry_points(group="tensorferry.transports") if p.dist.name == "tensorferry"
    ]
    assert {point.name for point in points} == set(pyproject()["project"]["entry-points"]["tensorferry.transports"])
    assert [point.name for point in points if point.load().name != point.name] == []


def test_every_tool_that_set_up_installs_is_pinned() -> None:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    names = {re.match(r"[A-Za-z0-9_.-]+", name)[0].lower() for name in wanted} - {"tensorferry"}
    pinned = set(re.findall(r"^([a-z0-9-]+)==\S+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert names - pinned == set()


# ---------------------------------------------------------------- set-up


def set_up(layer: str, venv: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "VENV": str(venv)}
    return subprocess.run(
        [ROOT / "scripts" / "setup", layer], env=environ, capture_output=True, text=True, check=False, timeout=60
    )


def test_set_up_refuses_a_layer_that_it_does_not_know(tmp_path: Path) -> None:
    done = set_up("everything", tmp_path / "venv")
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert "demo, dev or engines" in done.stderr


def test_set_up_never_removes_an_environment_that_it_did_not_make(tmp_path: Path) -> None:
    mine = tmp_path / "venv" / "pyvenv.cfg"
    mine.parent.mkdir()
    mine.write_text("home = somewhere\n")
    done = set_up("demo", mine.parent)
    assert (done.returncode, mine.read_text()) == (1, "home = somewhere\n")
    assert "did not make it" in done.stderr


# ---------------------------------------------------------------- what is committed

# Written in pieces, so that this file passes its own test.
MACHINE_PATHS = re.compile(
    "|".join(
        (
            r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|Us" + r"ers)/",
            r"/opt/(?:whe" + r"els|py" + r"pi)",
            r"\bfa" + r"rm-",
            r"\.\./sha" + r"red\b",
            r"\.libr" + r"ary/",
            r"\.py" + r"env\b",
        )
    )
)


def test_no_committed_file_names_a_path_of_some_machine() -> None:
    wrong = []
    for name, mode in committed().items():
        if mode == "120000":
            continue
        text = (ROOT / name).read_bytes().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            if MACHINE_PATHS.search(line):
                wrong.append(f"{name}:{number}: {line.strip()[:100]}")
    assert wrong == []


def test_a_long_file_says_why() -> None:
    # The convention: a sentence that starts "Long because" in the first twelve lines.
    wrong = []
    for file in sources(*SHIPPED):
        lines = file.read_text().splitlines()
        if len(lines) > MAX_LINES and not any("Long because" in line for line in lines[:12]):
            wrong.append(f"{file.relative_to(ROOT)}: {len(lines)} lines, and no 'Long because ...' in its first twelve")
    assert wrong == []


# ---------------------------------------------------------------- what shipped code may not do

UNPICKLERS = {"_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve"}
UNPICKLING_CALLS = {"recv_pyobj", "send_pyobj", "recv_serialized", "send_serialized"}


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module.split(".")[0]]
    return []


def unpickles(node: ast.AST) -> bool:
    """torch.load, zmq's pyobj calls, and numpy's allow_pickle, which unpickle without anyone importing pickle."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return (
        called == "torch.load"
        or called.split(".")[-1] in UNPICKLING_CALLS
        or any(keyword.arg == "allow_pickle" for keyword in node.keywords)
    )


def test_nothing_shipped_can_unpickle() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in trees(*SHIPPED)
        for node in ast.walk(tree)
        if UNPICKLERS & set(imported_names(node)) or unpickles(node)
    ]
    assert wrong == []


def swallows(handler: ast.ExceptHandler) -> bool:
    """A handler for everything, or a broad one that does nothing."""
    if handler.type is None:
        return True
    caught = {ast.unparse(t) for t in (handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type])}
    does_nothing = all(
        isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in handler.body
    )
    return does_nothing and bool(caught & {"Exception", "BaseException"})


def test_nothing_shipped_swallows_every_error() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in trees(*SHIPPED)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and swallows(node)
    ]
    assert wrong == []


def test_nothing_shipped_gives_a_simple_queue_a_time_limit() -> None:
    # On CPython 3.11 and 3.12 such a `get` can wait for ever (backends/_inbox.py).
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in trees(*SHIPPED)
        if "SimpleQueue" in (ROOT / name).read_text() and not name.endswith("_inbox.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(".get")
        and any(keyword.arg == "timeout" for keyword in node.keywords)
    ]
    assert wrong == []


def test_no_import_climbs_by_dots() -> None:
    # Through the links `from ..core` would still work; a full name says which room is meant.
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in trees(*SHIPPED)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert wrong == []


# ---------------------------------------------------------------- tests


def skips_without_reason(tree: ast.Module) -> Iterator[int]:
    """Lines where pytest.mark.skip or skipif stands without a reason, or pytest.skip without a word."""
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        call = called.get(id(node))
        name = ast.unparse(node)
        named = call is not None and any(keyword.arg == "reason" for keyword in call.keywords)
        if name.endswith("mark.skip") or name == "pytest.skip":
            if not named and not (call is not None and call.args):
                yield node.lineno
        elif name.endswith("mark.skipif") and not named:
            yield node.lineno


def test_every_skip_has_a_reason() -> None:
    wrong = [f"{name}:{line}" for name, tree in trees("tests", "conformance") for line in skips_without_reason(tree)]
    assert wrong == []
