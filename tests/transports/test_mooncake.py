"""The mooncake transport in one process: what it refuses, what it says of itself, and its smaller parts."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import msgspec
import pytest
from transport_ends import at, ended, eventually, need, source, wheel

from tensorferry import errors
from tensorferry.backends import _mooncake_engine
from tensorferry.backends import _mooncake_environment as environment
from tensorferry.backends import mooncake as mooncake_module
from tensorferry.backends._mooncake_jobs import cut
from tensorferry.backends._mooncake_sockets import Aftermath, hasten_listener, stop_listening
from tensorferry.backends._mooncake_wire import Answer, ask, session_name
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.core.memory import Memory
from tensorferry.core.transport import MAX_DESCRIPTOR_BYTES, Copy, Readiness, Status
from tensorferry.plugins.registry import open_transport

HERE = {"host": "127.0.0.1"}


@pytest.fixture
def installed() -> None:
    need("mooncake")


@pytest.fixture
def one(installed: None) -> Iterator[MooncakeTransport]:
    transport = MooncakeTransport(MooncakeOptions(**HERE))
    yield transport
    transport.close()


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nobody has set any of the engine's variables."""
    ours = {variable.name for variable in environment.SETS}
    for name in ours | {name for name in os.environ if name.startswith("MC_")}:
        monkeypatch.setenv(name, "")  # so that what the test lets be set is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_ours", {})


# ---- options -------------------------------------------------------------------------------------------------


def test_a_protocol_is_refused_because_the_engine_would_ignore_it() -> None:
    with pytest.raises(errors.ConfigError, match="ignores the protocol") as caught:
        open_transport("mooncake", {"protocol": "rdma"})
    assert 'require="rdma"' in caught.value.hint
    assert "MC_FORCE_TCP" in caught.value.hint


RDMA_IS_NOT_THERE = {
    "no device": ({}, {}, "there is no RDMA device"),
    "no link": ({"mlx5_0": False}, {}, "no port of mlx5_0 is active"),
    "forced": ({"mlx5_0": True}, {"MC_FORCE_TCP": "1"}, "MC_FORCE_TCP is set"),
    "filtered": ({"mlx5_0": True}, {"MC_TE_FILTERS": "mlx5_9"}, "MC_TE_FILTERS"),
}


@pytest.mark.parametrize("asked", [{"require": "rdma"}, {"device": "mlx5_0"}], ids=["require", "device"])
@pytest.mark.parametrize(("ports", "variables", "cause"), RDMA_IS_NOT_THERE.values(), ids=RDMA_IS_NOT_THERE.keys())
def test_rdma_that_is_not_there_is_not_replaced(
    installed: None,
    monkeypatch: pytest.MonkeyPatch,
    no_variables: None,
    asked: dict[str, str],
    ports: dict[str, bool],
    variables: dict[str, str],
    cause: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "rdma_ports", lambda: ports)
    monkeypatch.setattr(environment, "why_not_usable", lambda _: ("", ""))
    monkeypatch.setattr(_mooncake_engine.Engine, "__init__", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(errors.TransportUnavailable, match=cause) as caught:
        MooncakeTransport(MooncakeOptions(**HERE, **asked))
    assert caught.value.hint


LOCKED = ("`ulimit -l` allows 8192 KiB to be locked", "`ulimit -l unlimited`")


def test_a_device_that_this_process_may_not_use_is_kept_from_the_engine(
    installed: None, monkeypatch: pytest.MonkeyPatch, no_variables: None
) -> None:
    """Where memory may not be locked it would take the device, and then refuse every registration."""
    monkeypatch.setattr(environment, "rdma_ports", lambda: {"mlx5_0": True})
    asked: list[object] = []
    monkeypatch.setattr(environment, "why_not_usable", lambda devices: asked.append(list(devices)) or LOCKED)
    probe = MooncakeTransport.probe()
    assert (probe.readiness, probe.path) == (Readiness.DEGRADED, "tcp")
    assert (LOCKED[0] in probe.reason, probe.hint) == (True, LOCKED[1])
    assert asked == [["mlx5_0"]]
    with environment.without_vain_devices():
        assert os.environ["MC_FORCE_TCP"] == "1"
    assert "MC_FORCE_TCP" not in os.environ
    opened = MooncakeTransport(MooncakeOptions(**HERE))
    assert (opened.path(), "MC_FORCE_TCP" in os.environ) == ("tcp", False)
    opened.close()
    with pytest.raises(errors.TransportUnavailable, match="8192 KiB") as caught:
        MooncakeTransport(MooncakeOptions(**HERE, require="rdma"))
    assert caught.value.hint == LOCKED[1]
    monkeypatch.setenv("MC_FORCE_HCA", "1")
    with pytest.raises(errors.TransportUnavailable, match="MC_FORCE_HCA is set and no RDMA device can be used"):
        MooncakeTransport(MooncakeOptions(**HERE))


def test_of_several_devices_those_count_that_are_asked_for_and_left(
    monkeypatch: pytest.MonkeyPatch, no_variables: None
) -> None:
    monkeypatch.setattr(environment, "rdma_ports", lambda: {"mlx5_0": True, "mlx5_1": True, "mlx5_2": False})
    monkeypatch.setattr(environment, "why_not_usable", lambda devices: (", ".join(devices), ""))
    assert environment.why_not_rdma()[0] == "mlx5_0, mlx5_1"
    assert environment.why_not_rdma("mlx5_1,mlx5_2")[0] == "mlx5_1"
    monkeypatch.setenv("MC_TE_FILTERS", "mlx5_1,mlx5_2")
    assert environment.why_not_rdma()[0] == "mlx5_1"
    assert "MC_TE_FILTERS" in environment.why_not_rdma("mlx5_0")[0]


def test_rdma_is_what_the_engine_says_and_not_what_the_devices_promise(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is active and that the engine does not take: its user-space driver is missing, say."""
    monkeypatch.setattr(environment, "why_not_rdma", lambda _: ("", ""))
    monkeypatch.setenv("MC_FORCE_TCP", "1")  # also on a machine that has RDMA
    with pytest.raises(errors.TransportUnavailable, match="the engine runs over tcp"):
        MooncakeTransport(MooncakeOptions(**HERE, require="rdma"))


def test_an_unknown_device_is_named(installed: None, monkeypatch: pytest.MonkeyPatch, no_variables: None) -> None:
    monkeypatch.setattr(environment, "rdma_ports", lambda: {"mlx5_0": True, "mlx5_1": True})
    with pytest.raises(errors.TransportUnavailable, match="no RDMA device mlx5_7") as caught:
        MooncakeTransport(MooncakeOptions(device="mlx5_7"))
    assert "mlx5_0, mlx5_1" in caught.value.hint


def test_an_engine_that_does_not_answer_its_own_handshake_is_closed_and_the_reason_told(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where loopback is down."""

    def ask(*_: object) -> Answer:
        raise errors.PeerUnreachable("Network is unreachable")

    monkeypatch.setattr(_mooncake_engine, "ask", ask)
    with pytest.raises(errors.TransportUnavailable, match="does not answer its own handshake") as caught:
        MooncakeTransport(MooncakeOptions(**HERE))
    assert "Loopback has to be up" in caught.value.hint


def test_an_address_that_the_engine_does_not_listen_on_is_refused(installed: None, no_variables: None) -> None:
    with pytest.raises(errors.TransportUnavailable, match="IPv4"):
        MooncakeTransport(MooncakeOptions(host="::1"))


# ---- the environment -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MC_LOG_DIR", "/tmp/anywhere"),
        ("MC_TCP_PROTO", "1"),
        ("MC_DISABLE_METACACHE", "1"),
        ("MC_TCP_ENABLE_CONNECTION_POOL", "false"),
    ],
)
def test_a_variable_under_which_the_engine_aborts_or_lies_is_refused(
    installed: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    probe = MooncakeTransport.probe()
    assert probe.readiness is Readiness.UNAVAILABLE
    assert name in probe.reason
    assert probe.hint == f"Unset {name}"
    with pytest.raises(errors.TransportUnavailable, match=name):
        MooncakeTransport(MooncakeOptions(**HERE))


def test_what_is_set_is_listed_with_its_reason_and_the_users_value_wins(
    no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "45")
    assert environment.prepare() == (10, 45)
    assert {variable.name: os.environ[variable.name] for variable in environment.SETS} == {
        "MC_LOG_LEVEL": "ERROR",
        "MC_TCP_PROGRESS_TIMEOUT_SEC": "10",
        "MC_TRANSFER_TIMEOUT": "45",
    }
    assert all(variable.reason for variable in environment.SETS)


def test_time_outs_that_are_unsound_together_are_named(
    no_variables: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "60")
    with caplog.at_level(logging.WARNING):
        environment.prepare()
    assert "MC_TCP_PROGRESS_TIMEOUT_SEC (60 s) is not below MC_TRANSFER_TIMEOUT (30 s)" in caplog.text


@pytest.mark.parametrize(
    ("progress", "transfer", "said"),
    [
        (None, None, ""),
        ("4", "5", ""),
        ("60", "5", "MC_TCP_PROGRESS_TIMEOUT_SEC (60 s) is not below MC_TRANSFER_TIMEOUT (5 s)"),
        (None, "abc", "MC_TCP_PROGRESS_TIMEOUT_SEC (10 s) is not below MC_TRANSFER_TIMEOUT (5 s)"),
        ("4", "2 minutes", ""),
        ("abc", "30", "MC_TCP_PROGRESS_TIMEOUT_SEC (30 s) is not below MC_TRANSFER_TIMEOUT (30 s)"),
    ],
)
def test_the_probe_names_time_outs_that_are_unsound_as_opening_does(
    installed: None,
    no_variables: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    progress: str | None,
    transfer: str | None,
    said: str,
) -> None:
    """The engine reads no digits as 0, and less than 5 s as 5."""
    for name, value in (("MC_TCP_PROGRESS_TIMEOUT_SEC", progress), ("MC_TRANSFER_TIMEOUT", transfer)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert MooncakeTransport.probe().facts.get("time_outs", "").startswith(said or "nothing") is bool(said)
    environment.prepare()
    assert [record.message.startswith(said) for record in caplog.records] == ([True] if said else [])


def test_an_option_that_the_environment_overrules_is_said_to_be(
    no_variables: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert environment.prepare(progress_s=3, transfer_s=20) == (3, 20)
    assert caplog.text == ""
    assert environment.prepare(progress_s=4, transfer_s=20) == (3, 20)
    assert "MC_TCP_PROGRESS_TIMEOUT_SEC=3 is set by an earlier mooncake transport of this process" in caplog.text


DEFAULT = "15000-17000"


@pytest.mark.parametrize(
    ("least", "most", "ports"),
    [
        (None, None, DEFAULT),
        ("16000", None, "16000-17000"),
        ("61000", "61010", "61000-61010"),
        ("30000", "62000", "30000-62000"),
        ("20000 or so", "20010", "20000-20010"),
        ("80", "90", DEFAULT),
        ("1023", "2000", DEFAULT),
        ("0", "10", DEFAULT),
        ("70000", "70100", DEFAULT),
        ("40000", "40010", DEFAULT),
        ("16000", "15000", DEFAULT),
        ("", "16000", DEFAULT),
        ("-20000", "16000", DEFAULT),
    ],
)
def test_the_ports_are_those_that_the_engine_takes_and_not_those_that_it_is_told(
    installed: None,
    monkeypatch: pytest.MonkeyPatch,
    no_variables: None,
    least: str | None,
    most: str | None,
    ports: str,
) -> None:
    """As seen of the engine, with each of these."""
    for name, value in (("MC_MIN_RPC_PORT", least), ("MC_MAX_RPC_PORT", most)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert environment.port_range() == ports
    facts = MooncakeTransport.probe().facts
    assert facts["ports"] == ports
    assert facts.get("MC_MIN_RPC_PORT") == least


def test_the_ports_under_their_other_names_count_where_the_first_are_not_there(
    monkeypatch: pytest.MonkeyPatch, no_variables: None
) -> None:
    monkeypatch.setenv("MC_MIN_PRC_PORT", "15500")
    assert environment.port_range() == "15500-17000"
    monkeypatch.setenv("MC_MIN_RPC_PORT", "16000")
    assert environment.port_range() == "16000-17000"


def test_the_engine_listens_where_the_ports_say(installed: None) -> None:
    """In a process of its own: it reads them once."""
    program = (
        "from tensorferry.backends import _mooncake_environment as environment\n"
        "from tensorferry.backends.mooncake import MooncakeTransport as M, MooncakeOptions as O\n"
        "t = M(O(host='127.0.0.1'))\n"
        "least, most = map(int, environment.port_range().split('-'))\n"
        "print(least, all(least <= port <= most for port in (t._engine.port, t._engine.data_port))); t.close()"
    )
    for told, least in (("80", 15000), ("61000", 61000)):
        variables = {"MC_MIN_RPC_PORT": told, "MC_MAX_RPC_PORT": "61999"}
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True,
            timeout=60, check=True,
        )  # fmt: skip
        assert done.stdout.split() == [str(least), "True"]


# ---- what is missing -----------------------------------------------------------------------------------------


def test_the_engine_that_is_not_installed_is_named_with_its_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda: "")
    probe = MooncakeTransport.probe()
    assert probe.readiness is Readiness.UNAVAILABLE
    assert "tensorferry[mooncake-cpu]" in probe.hint
    assert "tensorferry[mooncake]'" in probe.hint


@pytest.mark.parametrize("version", ["0.3.12", "0.3.12.post9", "0.2", "0.3.9"])
def test_an_engine_from_before_the_security_fixes_is_refused(
    installed: None, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda: version)
    probe = MooncakeTransport.probe()
    assert probe.readiness is Readiness.UNAVAILABLE
    assert version in probe.reason
    assert "0.3.13" in probe.reason


@pytest.mark.parametrize("lacks", ["package", "engine"])
def test_half_an_installation_is_seen_before_the_engine_is_asked_for(
    installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: str
) -> None:
    found = importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        if name != "mooncake":
            return found(name)
        hollow = ModuleSpec(name, None, is_package=True)
        hollow.submodule_search_locations = [str(tmp_path)]
        return hollow if lacks == "engine" else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    probe = MooncakeTransport.probe()
    assert probe.readiness is Readiness.UNAVAILABLE
    assert f"installed by halves: its {lacks} is not there" in probe.reason
    assert "--force-reinstall" in probe.hint


@pytest.mark.parametrize(("there", "said"), [(b"", "has 0 bytes, and 7 were brought"), (None, "is not there")])
def test_a_library_that_ends_too_early_is_seen_before_whoever_touches_it_is_ended(
    installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bytes | None, said: str
) -> None:
    """As a full disk leaves it: the dynamic loader takes it, and the process ends by SIGBUS."""
    folder = wheel(tmp_path, "mooncake-cut", "mooncake/engine.so", there)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(environment, "DISTRIBUTIONS", ("mooncake-cut",))
    probe = MooncakeTransport.probe()
    assert probe.readiness is Readiness.UNAVAILABLE
    assert probe.reason == f"Mooncake 9.9 is installed by halves: its engine.so {said}"
    assert probe.hint == "pip install --force-reinstall --no-deps mooncake-cut"
    with pytest.raises(errors.TransportUnavailable, match="installed by halves"):
        MooncakeTransport(MooncakeOptions(**HERE))


def gone(library: str) -> str:
    """As the dynamic loader puts it."""
    return f"{library}: cannot open shared object file: No such file or directory"


CUT = "/usr/lib/x86_64-linux-gnu/libcurl.so.4: file too short"


def test_a_library_that_is_there_and_does_not_load_is_not_called_missing(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "is_cpu_build", lambda: True)
    monkeypatch.setattr(environment, "refused", lambda name: CUT if name == "libcurl.so.4" else "")
    probe = MooncakeTransport.probe()
    assert probe.reason == f"the Mooncake engine needs libcurl.so.4, which is there and does not load: {CUT}"
    assert probe.hint == "Install anew the package that has it: apt-get install --reinstall libcurl4"
    old = "/lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.99' not found (required by engine.so)"
    unfit = environment.explain_import(ImportError(old))
    assert unfit.reason == (
        "the Mooncake engine needs GLIBCXX_3.4.99 of libstdc++.so.6, and /lib/x86_64-linux-gnu/libstdc++.so.6 is older"
    )


@pytest.mark.parametrize(("library", "package"), environment.LIBRARIES.items())
def test_each_missing_library_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, library: str, package: str
) -> None:
    monkeypatch.setattr(environment, "refused", lambda name: gone(name) if name in (library, "libcurl.so.4") else "")
    unfit = environment.explain_import(ImportError(f"{library}: cannot open shared object file: No such file"))
    assert library in unfit.reason
    assert "libcurl.so.4" in unfit.reason
    assert package in unfit.hint.split()
    assert "libcurl4" in unfit.hint.split()


def test_a_library_of_the_wheels_own_that_is_gone_is_no_package_of_the_system(installed: None) -> None:
    found = environment._distribution()
    assert found is not None
    brought = next(file.name for file in found.files or [] if file.name.startswith("libglog"))
    unfit = environment.explain_import(ImportError(f"{brought}: cannot open shared object file: No such file"))
    assert "installed by halves" in unfit.reason
    assert unfit.hint == f"pip install --force-reinstall --no-deps {found.name}"


def test_an_engine_that_is_told_to_use_rdma_where_there_is_none_says_which_variable_it_was(
    installed: None, no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_FORCE_HCA", "0")  # as seen, its being there is what counts
    monkeypatch.setattr(environment, "rdma_ports", dict)
    assert MooncakeTransport.probe().reason.startswith("MC_FORCE_HCA is set")
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    assert MooncakeTransport.probe().usable


def test_a_host_without_an_address_of_the_family_that_the_engine_uses_is_told(
    installed: None, no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_module, "local_addresses", lambda: ["fd00::2"])
    probe = MooncakeTransport.probe()
    assert "within this host alone, which has no address of IPv4 for others" in probe.reason
    assert probe.hint.startswith("For other hosts set MC_USE_IPV6")


@pytest.mark.parametrize("library", ["libcudart.so.12", "libcuda.so.1"])
def test_the_cuda_build_on_a_machine_without_cuda_is_told_from_a_missing_package(library: str) -> None:
    unfit = environment.explain_import(ImportError(f"{library}: cannot open shared object file: No such file"))
    assert "CUDA build" in unfit.reason
    assert library in unfit.reason
    assert "tensorferry[mooncake-cpu]" in unfit.hint


def test_an_engine_that_cannot_be_loaded_is_unavailable_and_breaks_nothing(installed: None, tmp_path: Path) -> None:
    """A real import that fails in another process, as the dynamic loader would let it fail."""
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").write_text("")
    text = "libibverbs.so.1: cannot open shared object file: No such file or directory"
    (package / "engine.py").write_text(f"raise ImportError({text!r})")
    program = (
        "from tensorferry.backends.mooncake import MooncakeTransport as M, MooncakeOptions as O\n"
        "from tensorferry.core.errors import TransportUnavailable\n"
        "try:\n    M(O())\nexcept TransportUnavailable as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "needs libibverbs.so.1" in done.stdout
    assert "apt-get install libibverbs1" in done.stdout


@pytest.mark.parametrize(("cause", "readiness"), [("no device", "degraded"), ("", "ready")])
@pytest.mark.parametrize("cpu_build", [True, False], ids=["without CUDA", "with CUDA"])
def test_a_probe_sets_nothing_and_loads_nothing_of_the_engine_where_it_need_not(
    installed: None, no_variables: None, cause: str, readiness: str, cpu_build: bool
) -> None:
    """It may well not be chosen, and the process may use Mooncake for something else."""
    program = (
        "import os, sys\nbefore = dict(os.environ)\n"
        "from tensorferry.backends import _mooncake_environment as environment\n"
        f"environment.is_cpu_build = lambda: {cpu_build}\n"
        f"environment.why_not_rdma = lambda device='': ({cause!r}, '')\n"
        "from tensorferry.backends.mooncake import MooncakeTransport as M\nprint(M.probe().readiness)\n"
        "print('mooncake.engine' in sys.modules, before == dict(os.environ), environment._ours)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == [readiness, f"{not cpu_build} True {{}}"]


def test_missing_libraries_are_named_without_loading_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.check_libraries()
    monkeypatch.setattr(environment, "refused", lambda name: gone(name) if name == "libibverbs.so.1" else "")
    with pytest.raises(environment.Unfit, match="needs libibverbs") as caught:
        environment.check_libraries()
    assert caught.value.hint == "Debian and Ubuntu: apt-get install libibverbs1"


# ---- what it says of itself ----------------------------------------------------------------------------------


def test_the_probe_says_the_path_the_devices_and_who_can_connect(installed: None, no_variables: None) -> None:
    probe = MooncakeTransport.probe()
    assert probe.usable
    assert probe.path == ("rdma" if probe.readiness is Readiness.READY else "tcp")
    assert probe.facts["engine"] == environment.installed_version()
    assert {"rdma_devices", "address", "listens"} <= probe.facts.keys()


def test_the_path_is_the_engines_own_word(one: MooncakeTransport) -> None:
    assert one.path() == ask("127.0.0.1", one._engine.port, 5).protocol
    assert one.path(one.connect(one.describe())) == one.path()


def test_two_engines_of_different_protocols_are_no_pair(one: MooncakeTransport) -> None:
    fields = msgspec.msgpack.decode(one.describe())
    fields[2], fields[7] = os.urandom(16), "rdma" if one.path() == "tcp" else "tcp"
    with pytest.raises(errors.TransportMismatch, match="runs over"):
        one.connect(msgspec.msgpack.encode(fields))


def test_the_fullest_descriptor_fits(one: MooncakeTransport) -> None:
    fields = msgspec.msgpack.decode(one.describe())
    fields[4] = "h" * 255
    fields[-2], fields[-1] = [(1 << 64) - 1] * 1024, [[n, (1 << 63) - 1, (1 << 63) - 1] for n in range(1024)]
    assert len(msgspec.msgpack.encode(fields)) <= MAX_DESCRIPTOR_BYTES


def test_a_descriptor_whose_regions_have_no_addresses_is_refused(one: MooncakeTransport) -> None:
    fields = msgspec.msgpack.decode(one.describe())
    fields[-1] = [[0, 1, 64]]
    with pytest.raises(errors.ProtocolViolation, match="addresses"):
        one.connect(msgspec.msgpack.encode(fields))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_once_its_thread_has_ended_a_post_fails_at_once(
    one: MooncakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = one.register(one.allocate(64))
    peer = one.connect(one.describe())
    local = source(one, b"x")
    waits = one.post(peer, [Copy(local, 0, at(region), 0, 1)])
    monkeypatch.setattr(one._poster, "_step", sys.exit)
    one._poster.nudge()
    one._poster.thread.join(30)
    assert ended(one, waits) in (Status.DONE, Status.FAILED)
    after = one.post(peer, [Copy(local, 0, at(region), 0, 1)])
    assert one.poll(after) is Status.FAILED
    one.close()
    assert one.poll(after) is Status.FAILED


def test_memory_that_overlaps_is_refused_and_what_was_retired_can_be_registered_again(one: MooncakeTransport) -> None:
    memory = one.allocate(8192)
    region = one.register(memory)
    with pytest.raises(errors.BadCall, match="overlaps"):
        one.register(Memory(memory.address + 4096, 4096, "cpu", memory.owner))
    one.retire(region)
    again = one.register(memory)
    assert again.generation > region.generation
    peer = one.connect(one.describe())
    local = source(one, b"again")
    assert ended(one, one.post(peer, [Copy(local, 0, at(again), 0, 5)])) is Status.DONE
    assert bytes(memory.view(0, 5)) == b"again"


# ---- the parts -----------------------------------------------------------------------------------------------


def test_copies_that_are_adjacent_on_both_sides_are_joined_and_long_ones_are_cut() -> None:
    here, there = object(), 1_000
    segments = [(here, there, 100 + n, 5_000 + n, 10) for n in (20, 0, 10)]
    assert cut(segments, 4096) == deque([(100, 5_000, 30)])
    assert cut(segments, 16) == deque([(100, 5_000, 16), (116, 5_016, 14)])


def test_nothing_is_joined_across_two_registrations() -> None:
    one, other = object(), object()
    assert len(cut([(one, 1_000, 0, 1_000, 10), (other, 1_000, 10, 1_010, 10)], 4096)) == 2
    assert len(cut([(one, 1_000, 0, 1_000, 10), (one, 1_010, 10, 1_010, 10)], 4096)) == 2
    assert len(cut([(one, 1_000, 0, 1_000, 10), (one, 1_000, 11, 1_010, 10)], 4096)) == 2


def test_a_session_is_an_address_and_a_port() -> None:
    assert session_name("10.0.0.1", 15_000) == "10.0.0.1:15000"
    assert session_name("fe80::1", 15_000) == "[fe80::1]:15000"


def test_the_engines_listener_is_found_and_another_port_is_not(one: MooncakeTransport) -> None:
    assert hasten_listener(one._engine.port)
    assert not hasten_listener(1)
    assert ask("127.0.0.1", one._engine.port, 5).protocol == one.path(), "it still answers"


GARBAGE = {
    "nothing": b"",
    "silence": None,
    "too long": struct.pack("<QB", 1 << 40, 1),
    "another kind": struct.pack("<QB", 3, 2) + b"{}",
    "no JSON": struct.pack("<QB", 3, 1) + b"}{",
    "other JSON": struct.pack("<QB", 3, 1) + b"[]",
    "half": struct.pack("<QB", 300, 1) + b'{"name":',
    "a port that is none": struct.pack("<QB", 24, 1) + b'{"tcp_data_port":700000}',
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE.keys())
def test_whatever_answers_instead_of_an_engine_makes_the_peer_unreachable(said: bytes | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                if said is None:
                    over.wait(30)
                else:
                    connection.sendall(said)

        over = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(errors.PeerUnreachable):
            ask("127.0.0.1", listener.getsockname()[1], 0.5 if said is None else 10)
        over.set()
        thread.join()


def test_the_data_host_is_the_engines_own_word_or_its_name() -> None:
    assert Answer("10.0.0.1:15000", "tcp", "", 1).data_host == "10.0.0.1"
    assert Answer("10.0.0.1:15000", "tcp", "10.0.0.2", 1).data_host == "10.0.0.2"


def test_bytes_of_the_dead_that_are_still_in_the_kernel_are_seen_until_they_are_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        dead, living = socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port))
        ours, others = listener.accept()[0], listener.accept()[0]
        with living, ours, others:
            dead.sendall(b"late")
            dead.close()
            aftermath = Aftermath(port)
            assert not aftermath.settled()
            living.sendall(b"not theirs")  # it was seen empty: whatever comes on it now is another's
            assert not aftermath.settled()
            assert ours.recv(2) == b"la"
            assert not aftermath.settled()
            assert ours.recv(2) == b"te"
            assert eventually(aftermath.settled)
            assert others.recv(100)


def test_the_start_of_an_engine_writes_nothing_and_passes_on_what_others_write(
    installed: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with _mooncake_engine._quietly():
        os.write(2, b"E1121 09:41:10.404366 14052 transfer_metadata.cpp:1098] noise\nsomebody's words\n")
    MooncakeTransport(MooncakeOptions(**HERE)).close()
    assert capfd.readouterr().err == "somebody's words\n"


def test_the_end_takes_no_handshake_any_more_and_waits_for_those_under_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), listener.accept()[0]:
            assert not stop_listening(port, 0.0), "one is under way"
        assert stop_listening(port, 30.0)
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", port), timeout=0.2)
        listener.settimeout(0.0)
        with pytest.raises(BlockingIOError):  # and not an error that an engine would write of, again and again
            listener.accept()
