"""How transports are found, judged and opened: from the metadata of whatever is installed, good or bad."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorferry.backends.shm import ShmTransport
from tensorferry.core.errors import (
    ConfigError,
    TransportUnavailable,
    UnknownOption,
    UnknownTransport,
    VersionMismatch,
)
from tensorferry.core.transport import Probe, Readiness
from tensorferry.plugins import registry

GOOD = """
from typing import Annotated
import msgspec
from tensorferry.backends.memory import MemoryTransport
from tensorferry.core.transport import Options, Probe, Readiness

class FakeOptions(Options, frozen=True):
    lanes: Annotated[int, msgspec.Meta(ge=1, description="Connections per peer.")] = 4
    eager: bool = False

class Fake(MemoryTransport):
    name = "{name}"
    options_type = FakeOptions
    contract_version = 1
    {more}
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with one module and these transports; returns the module's name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = 0

    def put(
        distribution: str,
        transports: dict[str, str] | list[str],
        source: str = "",
        version: str = "1.0",
        metadata: bool = True,
    ) -> str:
        nonlocal count
        count += 1
        module = f"plugin_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution}-{version}.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        names = transports if isinstance(transports, dict) else dict.fromkeys(transports, "Fake")
        lines = [f"{name} = {module}:{attribute}" for name, attribute in names.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines, ""]))
        importlib.invalidate_caches()
        return module

    return put


def good(name: str, more: str = "pass") -> str:
    return GOOD.format(name=name, more=more)


def names() -> list[str]:
    return [plugin.name for plugin in registry.available()]


# ---- listing -------------------------------------------------------------------------------------------------


def test_the_built_in_transports_are_installed() -> None:
    by_name = {plugin.name: plugin for plugin in registry.available()}
    assert by_name["shm"].distribution == "tensorferry"
    assert by_name["shm"].target == "tensorferry.backends.shm:ShmTransport"
    assert registry.load("shm") is ShmTransport


def test_every_entry_says_which_distribution_and_version_it_comes_from(install: Install) -> None:
    module = install("acme-ferry", ["acme"], good("acme"), version="3.2")
    assert registry.Plugin("acme", "acme-ferry", "3.2", f"{module}:Fake") in registry.available()


def test_listing_imports_no_plugin(install: Install) -> None:
    module = install("acme-ferry", ["acme"], "raise SystemExit('imported')")
    assert "acme" in names()
    assert module not in sys.modules


def test_only_the_transport_that_is_asked_for_is_imported(install: Install) -> None:
    wanted = install("acme-ferry", ["acme"], good("acme"))
    other = install("brand-ferry", ["brand"], good("brand"))
    assert registry.load("acme").name == "acme"
    assert wanted in sys.modules
    assert other not in sys.modules


def test_what_is_installed_or_removed_meanwhile_is_seen_at_once(install: Install, tmp_path: Path) -> None:
    """stevedore's cache, on the disk and in memory, would serve the old list."""
    from stevedore.extension import ExtensionManager

    assert registry.load("shm") is ShmTransport
    ExtensionManager.ENTRY_POINT_CACHE[registry.GROUP] = []
    try:
        assert registry.load("shm") is ShmTransport
        install("acme-ferry", ["acme"], good("acme"))
        assert registry.load("acme").name == "acme"
        (tmp_path / "acme-ferry-1.0.dist-info" / "entry_points.txt").unlink()
        assert "acme" not in names()
        with pytest.raises(UnknownTransport):
            registry.load("acme")
    finally:
        del ExtensionManager.ENTRY_POINT_CACHE[registry.GROUP]


def test_listing_loads_no_stevedore_and_loading_no_torch() -> None:
    code = (
        "import sys\n"
        "from tensorferry.plugins import registry\n"
        "registry.available()\n"
        "assert 'stevedore' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('tensorferry.backends.')]\n"
        "registry.load('shm')\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'tensorferry.backends.memory' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_distribution_without_a_name_is_still_listed(install: Install) -> None:
    module = install("odd", ["odd"], good("odd"), metadata=False)
    (plugin,) = [plugin for plugin in registry.available() if plugin.name == "odd"]
    assert plugin.target == f"{module}:Fake"
    assert plugin.distribution
    assert plugin.version


# ---- one name, two distributions -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["acme", "shm"])
def test_a_name_that_two_distributions_claim_is_an_error_that_names_both(install: Install, name: str) -> None:
    """Even where entries of other names stand between the two, which stevedore's own check does not notice."""
    first = install("aa-ferry", {name: "Fake", "between": "Fake"}, good(name))
    second = install("zz-ferry", [name], good(name), version="2.0")
    with pytest.raises(ConfigError, match="more than once") as caught:
        registry.load(name)
    assert "aa-ferry 1.0" in caught.value.cause
    assert "zz-ferry 2.0" in caught.value.cause
    assert {first, second}.isdisjoint(sys.modules)
    assert names().count(name) == (3 if name == "shm" else 2)
    assert registry.probe(name).readiness is Readiness.BROKEN
    (ranked,) = [one for one in registry.ranked() if one.name == name]
    assert not ranked.automatic
    assert len(ranked.plugins) == names().count(name)


def test_the_same_entry_twice_is_one(install: Install, tmp_path: Path) -> None:
    module = install("acme-ferry", ["acme"], good("acme"))
    listed = tmp_path / "acme-ferry-1.0.dist-info" / "entry_points.txt"
    listed.write_text(listed.read_text() + f"acme = {module}:Fake\n")
    assert names().count("acme") == 1
    assert registry.load("acme").name == "acme"


# ---- what cannot be loaded -----------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, str, Readiness]] = {
    "missing engine": ("import no_such_engine", "no_such_engine", Readiness.UNAVAILABLE),
    "missing name in a module": ("from json import no_such_name", "no_such_name", Readiness.UNAVAILABLE),
    "raises": ("raise RuntimeError('no device')", "RuntimeError: no device", Readiness.BROKEN),
    "asserts": ("assert False, 'no device'", "AssertionError: no device", Readiness.BROKEN),
    "ends the process": ("import sys; sys.exit('bye')", "SystemExit: bye", Readiness.BROKEN),
    "is no Python": ("def", "SyntaxError", Readiness.BROKEN),
    "lacks the class": ("", "AttributeError", Readiness.BROKEN),
    "is a function": ("def Fake(): pass", "not a Transport", Readiness.BROKEN),
    "is another class": ("class Fake: pass", "not a Transport", Readiness.BROKEN),
    "is half a transport": (
        "from tensorferry.core.transport import Transport\n"
        "class Fake(Transport):\n    name, contract_version = 'acme', 1",
        "lacks __init__, allocate",
        Readiness.BROKEN,
    ),
    "has another name": (good("other"), "calls itself 'other'", Readiness.BROKEN),
}


@pytest.mark.parametrize(("source", "says", "readiness"), BROKEN.values(), ids=BROKEN.keys())
def test_a_plugin_that_cannot_be_loaded_is_unavailable_and_says_why(
    install: Install, source: str, says: str, readiness: Readiness
) -> None:
    install("acme-ferry", ["acme"], source)
    with pytest.raises(TransportUnavailable, match=r"acme-ferry 1\.0") as caught:
        registry.load("acme")
    assert says in caught.value.cause
    answer = registry.probe("acme")
    assert answer.readiness is readiness
    assert says in answer.reason
    assert registry.load("shm") is ShmTransport  # the others are as they were


def test_a_missing_module_is_named_in_the_hint(install: Install) -> None:
    install("acme-ferry", ["acme"], "import no_such_engine.part")
    with pytest.raises(TransportUnavailable) as caught:
        registry.load("acme")
    assert "'no_such_engine'" in caught.value.hint
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_another_version_of_the_contract_is_a_version_mismatch(install: Install) -> None:
    install("acme-ferry", ["acme"], good("acme", "contract_version = 99"))
    with pytest.raises(VersionMismatch, match="version 99"):
        registry.load("acme")
    assert registry.probe("acme").readiness is Readiness.BROKEN


def test_a_plugin_has_to_say_which_contract_it_is_written_for(install: Install) -> None:
    """The version that it would inherit agrees with every version."""
    install("acme-ferry", ["acme"], good("acme").replace("contract_version = 1", ""))
    with pytest.raises(VersionMismatch, match="does not say") as caught:
        registry.load("acme")
    assert "contract_version = 1" in caught.value.hint


@pytest.mark.parametrize(("wrong", "meant"), [("shmm", "shm"), ("memroy", "memory")])
def test_an_unknown_name_gets_a_suggestion(wrong: str, meant: str) -> None:
    with pytest.raises(UnknownTransport, match=repr(wrong)) as caught:
        registry.load(wrong)
    assert f"Did you mean {meant!r}?" in caught.value.hint
    assert "memory" in caught.value.hint
    assert "shm" in caught.value.hint
    assert registry.probe(wrong).readiness is Readiness.UNAVAILABLE


def test_an_unknown_name_that_resembles_nothing_gets_the_list() -> None:
    with pytest.raises(UnknownTransport) as caught:
        registry.load("xyzzy")
    assert "Did you mean" not in caught.value.hint
    assert "shm" in caught.value.hint


# ---- probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('no card')", "RuntimeError: no card"),
        ("raise SystemExit(1)", "SystemExit"),
        ("return None", "NoneType"),
        ("return 'ready'", "str"),
    ],
)
def test_probe_never_raises(install: Install, body: str, says: str) -> None:
    install("acme-ferry", ["acme"], good("acme", f"probe = classmethod(lambda cls: run())\ndef run():\n    {body}"))
    answer = registry.probe("acme")
    assert answer.readiness is Readiness.BROKEN
    assert says in answer.reason


def test_probe_passes_the_transports_own_answer_on() -> None:
    assert registry.probe("shm") == ShmTransport.probe()


# ---- opening -------------------------------------------------------------------------------------------------


def test_options_are_typed_and_strings_are_read(install: Install) -> None:
    install("acme-ferry", ["acme"], good("acme"))
    for options in ({"lanes": 2, "eager": True}, {"lanes": "2", "eager": "true"}):
        transport = registry.open_transport("acme", options)
        assert (transport._options.lanes, transport._options.eager) == (2, True)  # type: ignore[attr-defined]
        transport.close()
    registry.open_transport("acme").close()


def test_an_unknown_option_is_named_with_what_there_is(install: Install) -> None:
    install("acme-ferry", ["acme"], good("acme"))
    with pytest.raises(UnknownOption, match="'lane'") as caught:
        registry.open_transport("acme", {"lane": 2})
    assert "Did you mean 'lanes'?" in caught.value.hint
    assert "lanes (default 4: Connections per peer.)" in caught.value.hint
    assert "eager (default False)" in caught.value.hint
    with pytest.raises(UnknownOption, match="no options"):
        registry.open_transport("memory", {"lanes": 2})


@pytest.mark.parametrize("value", ["many", 0, -1, None, [], 1.5])
def test_a_value_that_an_option_cannot_have_is_a_config_error_that_names_it(install: Install, value: object) -> None:
    install("acme-ferry", ["acme"], good("acme"))
    with pytest.raises(ConfigError, match="lanes") as caught:
        registry.open_transport("acme", {"lanes": value})
    assert not isinstance(caught.value, UnknownOption)


@pytest.mark.parametrize("raised", ["RuntimeError('no card')", "errors.TransportUnavailable('no card')"])
def test_a_transport_that_fails_to_open_is_unavailable(install: Install, raised: str) -> None:
    body = f"def __init__(self, options):\n        raise {raised}"
    install("acme-ferry", ["acme"], "from tensorferry.core import errors\n" + good("acme", body))
    with pytest.raises(TransportUnavailable, match="no card"):
        registry.open_transport("acme")


# ---- ranking -------------------------------------------------------------------------------------------------


def ranking(install: Install, states: dict[str, Readiness]) -> list[registry.Ranked]:
    for name in states.keys() - {"shm", "memory"}:
        install(f"{name}-ferry", [name])
    paths = {"shm": "memcpy", "tcp": "tcp", "mooncake": "rdma"}
    known = {name: Probe(state, f"{name} is {state}", path=paths.get(name, "")) for name, state in states.items()}
    return [one for one in registry.ranked(lambda name: known.get(name, OTHER)) if one.name in states]


OTHER = Probe(Readiness.UNAVAILABLE, "not part of this test")


def test_the_order_is_by_preference_then_by_name_and_memory_is_never_automatic(install: Install) -> None:
    states = dict.fromkeys(["memory", "shm", "zebra", "acme"], Readiness.READY)
    ranked = ranking(install, states)
    assert [one.name for one in ranked] == ["shm", "acme", "zebra", "memory"]
    assert [one.automatic for one in ranked] == [True, True, True, False]
    assert ranked[0].reason.startswith("first choice")
    assert ranked[1].reason.startswith("follows shm")
    assert "named" in ranked[3].reason


def test_what_does_not_work_here_comes_last_and_says_why(install: Install) -> None:
    ranked = ranking(
        install,
        {
            "shm": Readiness.BROKEN,
            "acme": Readiness.DEGRADED,
            "memory": Readiness.READY,
            "zebra": Readiness.UNAVAILABLE,
        },
    )
    assert [one.name for one in ranked] == ["acme", "memory", "shm", "zebra"]
    assert [one.automatic for one in ranked] == [True, False, False, False]
    assert ranked[2].reason == "broken: shm is broken"
    assert ranked[3].reason == "unavailable: zebra is unavailable"


def test_what_works_less_well_than_it_could_is_taken_only_by_name_while_others_serve(install: Install) -> None:
    ranked = ranking(install, {"shm": Readiness.READY, "acme": Readiness.DEGRADED})
    assert [(one.name, one.automatic) for one in ranked] == [("shm", True), ("acme", False)]
    assert "acme is degraded" in ranked[1].reason


def test_what_is_not_opened_by_itself_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "tcp": Probe(Readiness.READY, "sockets work", path="tcp"),
        "mooncake": Probe(Readiness.DEGRADED, "works over TCP: there is no RDMA device", path="tcp"),
        "memory": Probe(Readiness.READY, "works", path="memcpy"),
    }
    ranked = registry.ranked
    monkeypatch.setattr(registry, "ranked", lambda: ranked(lambda name: told.get(name, OTHER)))
    opened, passed_over = registry.open_automatic()
    for one in opened:
        one.close()
    assert [one.name for one in opened] == ["tcp"]
    assert {v.name: v.reason for v in passed_over} == {
        "mooncake": "taken only when it is named: works over TCP: there is no RDMA device",
        "nixl": "unavailable: not part of this test",
        "shm": "unavailable: not part of this test",
    }
    assert not any(v.viable for v in passed_over)


@pytest.mark.parametrize(("promised", "kept"), [("rdma", False), ("memcpy", True), ("tcp", True), ("", True)])
def test_one_that_goes_a_worse_way_than_its_probe_promised_is_closed_and_passed_over(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, promised: str, kept: bool
) -> None:
    """As Mooncake did where it could not open the device that is active: over TCP, on open ports."""
    told = {
        "acme": Probe(Readiness.READY, "an active RDMA device is there", path=promised),
        "tcp": Probe(Readiness.READY, "sockets work", path="tcp"),
    }
    more = "closed = []\n    def close(self):\n        self.closed.append(self.name)\n        super().close()"
    module = importlib.import_module(install("acme-ferry", ["acme"], good("acme", more)))
    ranked = registry.ranked
    monkeypatch.setattr(registry, "ranked", lambda: ranked(lambda name: told.get(name, OTHER)))
    opened, passed_over = registry.open_automatic()
    assert ("acme" in [one.name for one in opened]) is kept
    assert module.Fake.closed == ([] if kept else ["acme"])
    for one in opened:
        one.close()
    if not kept:
        (verdict,) = [v for v in passed_over if v.name == "acme"]
        why = "its probe found rdma (an active RDMA device is there), and open it goes over memcpy"
        assert (verdict.path, verdict.viable, verdict.reason) == ("memcpy", False, why)
        assert f"transport acme is not used: {why}" in caplog.text
