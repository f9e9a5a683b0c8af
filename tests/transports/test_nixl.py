"""The nixl transport in one process: what it refuses, what it says of itself, and its smaller parts.

Long because the engine's environment is most of the work, and each variable and library has its test.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from engine_kit import changed
from transport_ends import PATIENCE_S, at, ended, need, source, wheel

from tensorferry import errors
from tensorferry.backends import _nixl_engine, _nixl_keeping
from tensorferry.backends import _nixl_environment as environment
from tensorferry.backends import nixl as nixl_module
from tensorferry.backends._mapping import Mapping
from tensorferry.backends._nixl_backends import STORAGE, check_backend, explain_backend
from tensorferry.backends._nixl_choice import choose
from tensorferry.backends._nixl_engine import PROGRESS_US, Agent
from tensorferry.backends._nixl_environment import Unfit
from tensorferry.backends._nixl_jobs import MOST_PIECES, cut
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.core.memory import Memory
from tensorferry.core.transport import MAX_DESCRIPTOR_BYTES, Copy, PeerState, Readiness, Status


@pytest.fixture
def installed() -> None:
    need("nixl")


@pytest.fixture
def one(installed: None) -> Iterator[NixlTransport]:
    transport = NixlTransport(NixlOptions(workers=1))
    yield transport
    transport.close()


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host with an active RDMA device that this process may use."""
    monkeypatch.setattr(environment, "rdma_ports", lambda: {"mlx5_0": True})
    monkeypatch.setattr(environment, "why_not_usable", lambda *_: ("", ""))


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nobody has set any of the engine's variables."""
    ours = {variable.name for variable in environment.SETS}
    for name in ours | {name for name in os.environ if name.startswith(("UCX_", "NIXL_"))}:
        monkeypatch.setenv(name, "")  # so that what the test lets be set is taken back
        monkeypatch.delenv(name)


def told(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, where nobody has set any of the engine's variables but these."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "NIXL_"))}
    return subprocess.run(
        [sys.executable, "-c", program], env={**clean, **variables}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


OPEN = (
    "from tensorferry.backends.nixl import NixlOptions as O, NixlTransport as T\n"
    "from tensorferry.core.errors import FerryError\n"
    "from tensorferry.core.transport import Copy, RemoteRegion, Status\n"
    "import time\n"
    "def carry(t):\n"
    "    r = t.register(t.allocate(1 << 20))\n"
    "    p = t.connect(t.describe())\n"
    "    h = t.post(p, [Copy(r, 0, RemoteRegion(r.id, r.generation), 1 << 19, 1 << 19)])\n"
    "    while t.poll(h) is Status.PENDING: time.sleep(0.001)\n"
    "    assert t.poll(h) is Status.DONE\n"
)


# ---- backends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["POSIX", "GDS", "OBJ", "GUSLI", "AZURE_BLOB", "GPUNETIO", "NOSUCH"])
def test_a_backend_that_writes_into_no_other_process_is_refused_by_name(installed: None, backend: str) -> None:
    with pytest.raises(errors.TransportUnavailable, match=backend) as caught:
        NixlTransport(NixlOptions(backend=backend))
    assert "UCX" in caught.value.hint


def test_libfabric_is_reached_by_option_and_all_that_it_lacks_is_named_with_its_package(installed: None) -> None:
    """The wheel brings the backend, and not the libraries that it needs. The dynamic loader names the first alone."""
    file = environment.bundled(environment.module_name(), "nixl/libplugin_LIBFABRIC.so")[0]
    missing = environment.lacking(file)
    if missing:
        with pytest.raises(errors.TransportUnavailable, match="LIBFABRIC backend needs") as caught:
            NixlTransport(NixlOptions(backend="LIBFABRIC"))
        for library in missing:
            assert library in str(caught.value)
            assert environment.PACKAGES.get(library, library) in caught.value.hint
    else:
        opened = NixlTransport(NixlOptions(backend="LIBFABRIC"))
        assert opened.path() == "libfabric"
        opened.close()


def test_a_library_that_is_too_old_is_told_from_one_that_is_missing() -> None:
    """As the loader puts it where Debian 12's libfabric1 is installed."""
    text = "/usr/lib/x86_64-linux-gnu/libfabric.so.1: version `FABRIC_1.10' not found (required by libplugin.so)"
    unfit = environment.explain_library(text, "NIXL's LIBFABRIC backend")
    assert unfit.reason == (
        "NIXL's LIBFABRIC backend needs FABRIC_1.10 of libfabric.so.1, and /usr/lib/x86_64-linux-gnu/libfabric.so.1 "
        "is older"
    )
    assert "libfabric 2.7 or later" in unfit.hint
    text = "/lib/libc.so.6: version `GLIBC_2.99' not found (required by libplugin.so)"
    assert environment.explain_library(text, "it").hint == "Install a later version of the package that has libc.so.6"


@pytest.mark.parametrize(
    "text",
    [
        "/usr/lib/libnuma.so.1: file too short",
        "libnuma.so.1: cannot open shared object file: Permission denied",
        "/usr/lib/libnuma.so.1: wrong ELF class: ELFCLASS32",
    ],
)
def test_a_library_that_is_there_and_does_not_load_is_not_called_missing(text: str) -> None:
    unfit = environment.explain_library(text, "it")
    assert unfit.reason == f"it needs libnuma.so.1, which is there and does not load: {text}"
    assert unfit.hint == "Install anew the package that has it: apt-get install --reinstall libnuma1"


def test_what_is_missing_together_is_named_together(tmp_path: Path) -> None:
    file = tmp_path / "libplugin.so"
    file.write_bytes(b"...libnot-there.so.3\0libhwloc.so.15.6\0libstdc++.so.6\0")
    assert environment.lacking(file) == [], "those that are there, and those of other names"
    unfit = environment.explain_library(
        "libfabric.so.1: cannot open shared object file", "it", ["libhwloc.so.15", "libcuda.so.1", "libfabric.so.1"]
    )
    assert unfit.reason == "it needs libfabric.so.1, libhwloc.so.15, libcuda.so.1, which this system lacks"
    assert unfit.hint == (
        "Debian and Ubuntu: apt-get install libfabric1 libhwloc15; "
        f"{environment.TOO_OLD['libfabric.so.1']}; libcuda.so.1 is in the NVIDIA driver"
    )


def test_every_backend_of_storage_is_told_from_those_of_the_network() -> None:
    there = ["UCX", "LIBFABRIC", *STORAGE]
    check_backend("UCX", there)
    check_backend("LIBFABRIC", there)
    with pytest.raises(environment.Unfit) as caught:
        check_backend("UCX_MO", there)
    assert caught.value.hint == "It has: LIBFABRIC, UCX"


def test_what_is_asked_of_ucx_cannot_be_had_of_another_backend(installed: None) -> None:
    with pytest.raises(errors.TransportUnavailable, match="is about UCX"):
        NixlTransport(NixlOptions(backend="LIBFABRIC", require="rdma"))


def test_of_a_peer_over_another_backend_than_ucx_no_end_is_proved(
    one: NixlTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = msgspec.msgpack.decode(one.describe())
    fields[2], fields[5] = os.urandom(16), "LIBFABRIC"
    monkeypatch.setattr(one, "_options", msgspec.structs.replace(one._options, backend="LIBFABRIC"))
    peer = one.connect(msgspec.msgpack.encode(fields))
    assert one.path(peer) == "libfabric"
    monkeypatch.setattr(type(peer.target), "ended", lambda _: True)
    assert one.peer_state(peer) is PeerState.UNKNOWN


# ---- which way -----------------------------------------------------------------------------------------------

EVERYTHING = {"rdma", "memcpy", "tcp"}


@pytest.mark.parametrize(
    ("tls", "ways"),
    [
        ("", EVERYTHING),
        ("all", EVERYTHING),
        ("tcp", {"tcp"}),
        ("rc", {"rdma"}),
        ("rc_v,ud_v,dc_x", {"rdma"}),
        ("ib", {"rdma"}),
        ("rc,self", {"rdma"}),
        ("cma,tcp", {"memcpy", "tcp"}),
        ("shm,rc,tcp", EVERYTHING),
        ("posix,sysv", set()),
        ("^ib", {"memcpy", "tcp"}),
        ("^tcp,cma", {"rdma"}),
        ("\\rc,tcp", {"rdma", "tcp"}),
    ],
)
def test_what_ucx_may_use_is_read_from_its_variable(tls: str, ways: set[str]) -> None:
    assert environment.ways(tls) == ways


RDMA_IS_NOT_THERE = {
    "no device": ({}, {}, "there is no RDMA device"),
    "no link": ({"mlx5_0": False}, {}, "no port of mlx5_0 is active"),
    "left out": ({"mlx5_0": True}, {"UCX_TLS": "tcp"}, "UCX_TLS=tcp leaves RDMA out"),
    "not loaded": ({"mlx5_0": True}, {"UCX_MODULES": "^ib"}, "UCX_MODULES"),
    "another device": ({"mlx5_0": True}, {"UCX_NET_DEVICES": "eth0"}, "UCX_NET_DEVICES=eth0 names no RDMA device"),
}


@pytest.mark.parametrize(("ports", "variables", "cause"), RDMA_IS_NOT_THERE.values(), ids=RDMA_IS_NOT_THERE.keys())
def test_rdma_that_is_not_there_is_not_replaced(
    installed: None,
    monkeypatch: pytest.MonkeyPatch,
    no_variables: None,
    ports: dict[str, bool],
    variables: dict[str, str],
    cause: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "rdma_ports", lambda: ports)
    monkeypatch.setattr(environment, "why_not_usable", lambda *_: ("", ""))
    monkeypatch.setattr(Agent, "__init__", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(errors.TransportUnavailable, match=cause) as caught:
        NixlTransport(NixlOptions(require="rdma"))
    assert caught.value.hint
    probe = NixlTransport.probe()
    assert probe.readiness is Readiness.DEGRADED
    assert probe.path == "tcp"
    assert cause in probe.reason


LOCKED = ("`ulimit -l` allows 8192 KiB to be locked", "`ulimit -l unlimited`")


def test_a_device_that_this_process_may_not_use_is_kept_from_ucx_and_the_rest_works(
    installed: None, monkeypatch: pytest.MonkeyPatch, no_variables: None, active: None
) -> None:
    """Given it, UCX would try for ever to register memory that may not be locked."""
    monkeypatch.setattr(environment, "why_not_usable", lambda *_: LOCKED)
    probe = NixlTransport.probe()
    assert (probe.readiness, probe.path, probe.hint) == (Readiness.DEGRADED, "tcp", LOCKED[1])
    assert LOCKED[0] in probe.reason
    with NixlClosing(NixlOptions(workers=1)) as transport:
        assert os.environ["UCX_MODULES"] == "^ib"
        assert transport.path() == "tcp"
    with pytest.raises(errors.TransportUnavailable, match="8192 KiB") as caught:
        NixlTransport(NixlOptions(require="rdma"))
    assert caught.value.hint == LOCKED[1], "not the variable, which is ours"


def test_where_the_user_leaves_ucx_nothing_but_a_device_that_cannot_be_used_that_is_told(
    installed: None, monkeypatch: pytest.MonkeyPatch, no_variables: None, active: None
) -> None:
    monkeypatch.setattr(environment, "why_not_usable", lambda *_: LOCKED)
    monkeypatch.setattr(Agent, "__init__", lambda *_: pytest.fail("an engine was started"))
    monkeypatch.setenv("UCX_TLS", "rc")
    with pytest.raises(errors.TransportUnavailable, match=r"UCX_TLS=rc lets UCX use RDMA alone.*8192 KiB"):
        NixlTransport(NixlOptions())
    assert NixlTransport.probe().readiness is Readiness.UNAVAILABLE


def test_what_ucx_locks_itself_has_to_be_allowed_too(
    monkeypatch: pytest.MonkeyPatch, no_variables: None, active: None
) -> None:
    """139 MiB for an agent, as measured. It hung where the limit had room for pool and staging alone."""
    monkeypatch.setattr(environment, "why_not_usable", lambda _, engine=0: LOCKED if engine >= 139 << 20 else ("", ""))
    assert environment.why_not_rdma() == LOCKED
    environment.prepare()
    assert os.environ["UCX_MODULES"] == "^ib"


@pytest.fixture
def stuck(installed: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    """An engine whose agents do not come back from their start, as UCX does not where a device refuses to register
    memory: it tries again for ever, deaf to signals."""
    made = Stuck()
    engine = SimpleNamespace(nixlAgentConfig=SimpleNamespace, nixlAgent=lambda *_: made, NIXL_THREAD_SYNC_RW=1)
    monkeypatch.setattr(_nixl_engine, "load", lambda: engine)
    monkeypatch.setattr(_nixl_engine, "_abandoned", made.abandoned)
    yield made
    made.coming_back.set()


class Stuck:
    def __init__(self) -> None:
        self.coming_back = threading.Event()
        self.abandoned: list[Agent] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def getAvailPlugins(self) -> list[str]:
        return ["UCX"]

    def createBackend(self, *_: object) -> None:
        self.meanwhile()
        self.coming_back.wait(PATIENCE_S)
        raise RuntimeError("it came back in the end")


def test_an_agent_that_does_not_come_back_from_its_start_is_given_up(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nixl_engine, "START_S", 0.1)
    try:
        with pytest.raises(Unfit, match=r"did not come back within 0\.1 s") as caught:
            Agent("UCX", "rdma", 1)
        assert "ulimit -l" in caught.value.hint
        assert len(stuck.abandoned) == 1, "its destructor would wait for what does not end"
        with pytest.raises(Unfit, match="started before") as caught:
            Agent("UCX", "tcp", 1)
        assert "ulimit -l" in caught.value.hint
    finally:
        stuck.coming_back.set()
    assert _nixl_engine._creating.acquire(timeout=PATIENCE_S), "one that comes back late makes room"
    _nixl_engine._creating.release()


def test_ctrl_c_is_heard_while_an_agent_does_not_come_back(stuck: Stuck) -> None:
    stuck.meanwhile = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Agent("UCX", "rdma", 1)
    assert len(stuck.abandoned) == 1
    stuck.coming_back.set()
    assert _nixl_engine._creating.acquire(timeout=PATIENCE_S)
    _nixl_engine._creating.release()


def test_where_no_thread_can_be_had_no_agent_starts_and_the_next_one_may(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(Unfit, match="can't start new thread"):
            Agent("UCX", "rdma", 1)
    assert not stuck.abandoned
    assert _nixl_engine._creating.acquire(timeout=PATIENCE_S)
    _nixl_engine._creating.release()


def test_memory_that_may_not_be_locked_is_refused_before_ucx_tries_it_for_ever(
    one: NixlTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one._agent, "_pins", True)
    monkeypatch.setattr(_nixl_engine, "why_not_locked", lambda nbytes: f"{nbytes} are too many")
    memory = one.allocate(4096)
    with pytest.raises(errors.TransportError, match="4096 are too many") as caught:
        one.register(memory)
    assert "memlock" in caught.value.hint
    monkeypatch.setattr(one._agent, "_pins", False)
    one.register(memory)


def test_where_a_device_is_active_ucx_is_given_nothing_else(
    monkeypatch: pytest.MonkeyPatch, no_variables: None, active: None
) -> None:
    assert choose(NixlOptions()) == ({"rdma"}, "rdma")
    assert choose(NixlOptions(require="tcp")) == ({"tcp"}, "tcp")
    monkeypatch.setenv("UCX_TLS", "rc,tcp")  # the user's own mixture: nothing says which of them UCX takes
    assert choose(NixlOptions()) == ({"rdma", "tcp"}, "")
    with pytest.raises(environment.Unfit, match="UCX_TLS=rc,tcp lets UCX take another way"):
        choose(NixlOptions(require="rdma"))
    with pytest.raises(environment.Unfit, match="UCX would use the latter"):
        choose(NixlOptions(require="tcp"))


@pytest.mark.parametrize("tls", ["all", "rc,tcp", "ib,tcp", "^cma", "rc,cma"])
def test_a_mixture_of_the_users_is_no_promise_of_rdma(
    installed: None, monkeypatch: pytest.MonkeyPatch, no_variables: None, active: None, tls: str
) -> None:
    """UCX does not say which of them it takes: the probe said rdma, and the path was tcp."""
    monkeypatch.setenv("UCX_TLS", tls)
    monkeypatch.setattr(Agent, "__init__", lambda *_: pytest.fail("an engine was started"))
    probe = NixlTransport.probe()
    assert (probe.readiness, probe.path) == (Readiness.DEGRADED, "tcp")
    assert probe.reason.endswith(f"UCX_TLS={tls} lets UCX take another way without saying so")
    assert probe.hint == "Unset it, or name RDMA alone (UCX_TLS=rc)"
    assert "rdma" in choose(NixlOptions())[0], "a peer that has nothing else is reached by it"


@pytest.mark.parametrize("tls", ["rc", "ib", "rc_v,ud_v", "^tcp,cma", "rc,self"])
def test_rdma_alone_is_one(monkeypatch: pytest.MonkeyPatch, no_variables: None, active: None, tls: str) -> None:
    monkeypatch.setenv("UCX_TLS", tls)
    assert environment.why_not_rdma() == ("", "")


def test_an_active_device_that_ucx_cannot_use_is_not_replaced_either(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its user-space driver is missing, say. Here: there is no device at all, and the engine is asked all the same."""
    monkeypatch.setattr(environment, "why_not_rdma", lambda: ("", ""))
    with pytest.raises(errors.TransportUnavailable, match="UCX cannot use the RDMA device"):
        NixlTransport(NixlOptions())
    assert NixlTransport.probe().readiness is Readiness.UNAVAILABLE


def test_two_sides_that_ucx_cannot_join_are_no_pair(one: NixlTransport) -> None:
    fields = msgspec.msgpack.decode(one.describe())
    fields[2], fields[6] = os.urandom(16), ["rdma"] if one.path() == "tcp" else ["tcp"]
    with pytest.raises(errors.TransportMismatch, match="UCX has"):
        one.connect(msgspec.msgpack.encode(fields))
    fields[5] = "LIBFABRIC"
    with pytest.raises(errors.TransportMismatch, match="LIBFABRIC"):
        one.connect(msgspec.msgpack.encode(fields))


def test_copies_that_the_kernel_refuses_are_no_path(
    installed: None, monkeypatch: pytest.MonkeyPatch, no_variables: None
) -> None:
    monkeypatch.setattr(environment, "copy_refused", lambda pid, address: "Operation not permitted")
    probe = NixlTransport.probe()
    assert probe.facts["cma"] == "refused: Operation not permitted"
    assert "copies" not in probe.reason
    with pytest.raises(errors.TransportUnavailable, match="not permitted"):
        NixlTransport(NixlOptions(require="memcpy"))
    with NixlClosing(NixlOptions(workers=1)) as transport:
        assert transport.path(transport.connect(transport.describe())) == "tcp"


class NixlClosing:
    def __init__(self, options: NixlOptions) -> None:
        self.transport = NixlTransport(options)

    def __enter__(self) -> NixlTransport:
        return self.transport

    def __exit__(self, *_: object) -> None:
        self.transport.close()


def test_the_kernel_says_whose_memory_may_be_copied_into() -> None:
    page = Mapping(4096)
    assert environment.copy_refused(os.getpid(), page.address) == ""
    page.seal()
    assert environment.copy_refused(os.getpid(), page.address) == "Bad address"
    assert environment.copy_refused(2**22 - 1, page.address) == "No such process"


def test_what_ucx_itself_says_of_its_choice_agrees_with_the_path_that_we_claim(installed: None) -> None:
    """UCX tells its choice on request, for people to read: too late and too coarse for `path`, and good enough here."""
    program = OPEN + (
        "t = T(O(workers=1, require={require!r}))\n"
        "u = T(O(workers=1, require={require!r}))\n"
        "r, s = u.register(u.allocate(1 << 20)), t.register(t.allocate(1 << 20))\n"
        "p = t.connect(u.describe())\n"
        "for n in (1, 100, 5000, 100_000, 1 << 20):\n"
        "    h = t.post(p, [Copy(s, 0, RemoteRegion(r.id, r.generation), 0, n)])\n"
        "    while t.poll(h) is Status.PENDING: time.sleep(0.001)\n"
        "print(t.path(p)); t.close(); u.close()\n"
    )
    for way, carries in (("memcpy", {"cma/memory"}), ("tcp", {"tcp/lo", "tcp/eth0"})):
        done = told(program.format(require=way), UCX_PROTO_INFO="y", UCX_LOG_LEVEL="info", UCX_NET_DEVICES="lo")
        assert done.stdout.split() == [way], done.stderr
        used = {word for block in done.stderr.split("by ucp_put")[1:] for word in chosen(block)}
        assert used
        assert used <= carries, done.stderr


def chosen(block: str) -> list[str]:
    """What the rows of the first table in UCX's own account name: transport/device."""
    lines = block.split("Range", 1)[1].splitlines()[2:]
    until = next((n for n, line in enumerate(lines) if "+--" in line), len(lines))
    return [word for line in lines[:until] for word in line.split("|")[-2].split() if "/" in word]


# ---- the environment -----------------------------------------------------------------------------------------


def test_what_is_set_is_listed_with_its_reason_and_the_users_value_wins(
    no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "rdma_ports", dict)
    monkeypatch.setenv("UCX_LOG_LEVEL", "warn")
    environment.prepare()
    assert {variable.name: os.environ[variable.name] for variable in environment.SETS} == {
        "UCX_MODULES": "^ib",
        "UCX_LOG_FILE": "stderr",
        "UCX_LOG_LEVEL": "warn",
        "NIXL_LOG_LEVEL": "FATAL",
        "UCX_DEBUG_SIGNO": "0",
    }
    assert all(variable.reason for variable in environment.SETS)
    assert NixlTransport.sets == environment.SETS


def test_on_a_host_with_an_rdma_device_ucx_keeps_its_modules(
    no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "rdma_ports", lambda: {"mlx5_0": False})
    monkeypatch.setattr(environment, "why_not_usable", lambda *_: ("", ""))
    environment.prepare()
    assert "UCX_MODULES" not in os.environ
    assert "UCX_MODULES" not in [variable.name for variable in NixlTransport.sets], "config show tells these"
    monkeypatch.setattr(environment, "rdma_ports", dict)
    assert "UCX_MODULES" in [variable.name for variable in NixlTransport.sets]


def test_standard_output_stays_the_programs_own_however_much_the_engine_has_to_say(installed: None) -> None:
    done = told(OPEN + "t = T(O()); carry(t); t.close(); print('mine')", UCX_LOG_LEVEL="info", NIXL_LOG_LEVEL="INFO")
    assert done.returncode == 0
    assert done.stdout == "mine\n"
    assert done.stderr, "it was asked to talk"
    done = told(OPEN + "t = T(O()); carry(t); t.close(); print('mine')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "")


@pytest.mark.parametrize("file", ["{}/not-there/x", "file:{}/not-there/%p:x", "{}", "file:"])
def test_a_log_file_that_ucx_cannot_open_is_refused_and_does_not_abort_the_process(
    installed: None, tmp_path: Path, file: str
) -> None:
    program = OPEN + (
        "print(T.probe().readiness)\ntry:\n    T(O()); print('opened')\nexcept FerryError as error:\n    print(error)"
    )
    done = told(program, UCX_LOG_FILE=file.format(tmp_path))
    assert done.returncode == 0, done.stderr
    readiness, refused = done.stdout.splitlines()
    assert readiness == "unavailable"
    assert f"UCX_LOG_FILE={file.format(tmp_path)} is set" in refused
    assert "Unset UCX_LOG_FILE" in refused


@pytest.mark.parametrize("file", ["stdout", "stderr:x", "{}/x", "file:{}/%h-%p", ""])
def test_a_log_file_that_ucx_can_open_is_the_users(installed: None, tmp_path: Path, file: str) -> None:
    program = OPEN + "t = T(O(workers=1)); t.close(); print(T.probe().usable)"
    assert told(program, UCX_LOG_FILE=file.format(tmp_path)).stdout.split() == ["True"]


@pytest.mark.parametrize("variables", [{"UCX_TLS": "posix"}, {"UCX_NET_DEVICES": "nosuch0"}], ids=["tls", "devices"])
def test_variables_under_which_ucx_can_do_nothing_are_named(installed: None, variables: dict[str, str]) -> None:
    program = OPEN + "try:\n    T(O()); print('opened')\nexcept FerryError as error:\n    print(error)"
    done = told(program, **variables)
    ((name, value),) = variables.items()
    assert f"{name}={value}" in done.stdout, done


@pytest.mark.parametrize(
    ("modules", "copies"),
    [(None, True), ("all", True), ("^ib", True), ("cma,ib", True), ("^cma", False), ("ib", False), ("", False)],
)
def test_copies_are_no_way_of_a_ucx_whose_modules_leave_them_out(
    monkeypatch: pytest.MonkeyPatch, no_variables: None, modules: str | None, copies: bool
) -> None:
    """As seen: with these UCX took TCP for what without them are copies between processes."""
    if modules is not None:
        monkeypatch.setenv("UCX_MODULES", modules)
    found, _ = choose(NixlOptions())
    assert ("memcpy" in found) is copies
    if not copies:
        with pytest.raises(Unfit, match=f"UCX_MODULES={re.escape(modules or '')} leaves it out"):
            choose(NixlOptions(require="memcpy"))


def test_ucx_variables_are_respected_and_told(installed: None, no_variables: None) -> None:
    program = OPEN + (
        "p = T.probe(); t = T(O(workers=1)); carry(t)\n"
        "import json; print(json.dumps([p.facts, t.path(t.connect(t.describe()))])); t.close()"
    )
    facts, path = json.loads(told(program, UCX_TLS="tcp", UCX_NET_DEVICES="lo").stdout)
    assert (facts["UCX_TLS"], facts["UCX_NET_DEVICES"]) == ("tcp", "lo")
    assert path == "tcp"


# ---- what is missing -----------------------------------------------------------------------------------------


def test_the_engine_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "MODULES", ("no_such_nixl",))
    probe = NixlTransport.probe()
    assert probe.readiness is Readiness.UNAVAILABLE
    assert "tensorferry[nixl]" in probe.hint
    with pytest.raises(errors.TransportUnavailable, match="not installed"):
        NixlTransport(NixlOptions())


def test_an_engine_for_another_python_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "nixl_elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_bindings.cpython-30-x86_64-linux-gnu.so").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "MODULES", ("nixl_elsewhere",))
    probe = NixlTransport.probe()
    assert probe.readiness is Readiness.UNAVAILABLE
    assert "this Python" in probe.reason
    assert "--force-reinstall --no-deps nixl-elsewhere" in probe.hint, "without it pip says that nothing is to be done"
    assert probe.facts["engine"] == "nixl_elsewhere unknown", "that it is there makes it a problem, not a note"


def test_an_engine_of_which_pip_knows_and_python_does_not_is_installed_by_halves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(wheel(tmp_path, "nixl-hollow", "nixl_hollow/_bindings.so", None))
    monkeypatch.setattr(environment, "MODULES", ("nixl_hollow",))
    probe = NixlTransport.probe()
    assert probe.reason == "nixl_hollow 9.9 is installed by halves: its package is not there"
    assert probe.hint == "pip install --force-reinstall --no-deps nixl-hollow"
    assert probe.facts["engine"] == "nixl_hollow 9.9", "that it is there makes it a problem, not a note"


def test_a_library_that_ends_too_early_is_seen_before_whoever_touches_it_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a full disk leaves it: the dynamic loader takes it, and the process ends by SIGBUS."""
    monkeypatch.syspath_prepend(wheel(tmp_path, "nixl-cut", "nixl_cut/_bindings.so", b"1234"))
    monkeypatch.setattr(environment, "MODULES", ("nixl_cut",))
    probe = NixlTransport.probe()
    assert probe.readiness is Readiness.UNAVAILABLE
    assert probe.reason == "nixl_cut 9.9 is installed by halves: its _bindings.so has 4 bytes, and 7 were brought"
    assert probe.hint == "pip install --force-reinstall --no-deps nixl-cut"
    with pytest.raises(errors.TransportUnavailable, match="installed by halves"):
        NixlTransport(NixlOptions())


@pytest.mark.parametrize(("library", "holder"), environment.PACKAGES.items())
def test_each_missing_library_is_named_with_what_holds_it(library: str, holder: str) -> None:
    unfit = environment.explain_library(f"{library}: cannot open shared object file: No such file", "the NIXL engine")
    assert library in unfit.reason
    assert holder in unfit.hint


def test_a_library_of_the_wheels_own_that_is_gone_is_no_package_of_the_system(installed: None) -> None:
    brought = environment.bundled(environment.module_name(), "libucs*.so*")[0].name
    unfit = environment.explain_library(f"{brought}: cannot open shared object file: No such file", "the NIXL engine")
    assert "installed by halves" in unfit.reason
    assert "--force-reinstall" in unfit.hint
    assert "package" not in unfit.hint


def test_the_wheel_that_is_loaded_is_the_one_that_import_nixl_has_taken(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = environment.module_name()
    other = next(name for name in environment.MODULES if name != before)
    monkeypatch.delitem(sys.modules, f"{before}._bindings", raising=False)
    monkeypatch.setitem(sys.modules, f"{other}._bindings", sys)
    assert environment.module_name() == other


@pytest.mark.parametrize("first", ["nixl", "tensorferry"])
def test_the_engine_is_shared_with_a_program_that_imports_nixl_itself(installed: None, first: str) -> None:
    theirs = "import nixl; assert nixl._api.nixl_agent\n"
    ours = OPEN + "t = T(O(workers=1)); carry(t)\n"
    done = told(
        (theirs + ours if first == "nixl" else ours + theirs) + "t.close(); print('both')", NIXL_LOG_LEVEL="ERROR"
    )
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["both"]), done.stderr


@pytest.mark.parametrize("first", ["mooncake", "nixl"])
def test_both_engines_in_one_process_register_the_same_memory_and_end_cleanly(installed: None, first: str) -> None:
    need("mooncake")
    program = OPEN + (
        "from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport\n"
        "def nixl(): return T(O(workers=1))\n"
        "def mooncake(): return MooncakeTransport(MooncakeOptions(host='127.0.0.1'))\n"
        "opens = {'nixl': nixl, 'mooncake': mooncake}\n"
        f"ends = {{name: opens[name]() for name in sorted(opens, reverse={first == 'nixl'})}}\n"
        "memory = ends['nixl'].allocate(1 << 20)\n"
        "for t in ends.values():\n"
        "    r = t.register(memory); p = t.connect(t.describe())\n"
        "    h = t.post(p, [Copy(r, 0, RemoteRegion(r.id, r.generation), 1 << 19, 1 << 19)])\n"
        "    while t.poll(h) is Status.PENDING: time.sleep(0.001)\n"
        "    print(t.name, t.poll(h).name)\n"
        "for t in ends.values(): t.close()\n"
    )
    done = told(program)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["mooncake DONE", "nixl DONE"]


# ---- what it says of itself ----------------------------------------------------------------------------------


def test_the_probe_says_the_path_the_devices_and_who_can_connect(installed: None, no_variables: None) -> None:
    probe = NixlTransport.probe()
    assert probe.usable
    assert probe.path == ("rdma" if probe.readiness is Readiness.READY else "tcp")
    assert {"engine", "rdma_devices", "cma", "ptrace_scope", "listens"} <= probe.facts.keys()


@pytest.mark.parametrize(("told", "ports"), [(None, None), ("0", None), ("", None), ("21000", "21000")])
def test_the_probe_tells_the_ports_where_they_are_set(
    installed: None, monkeypatch: pytest.MonkeyPatch, no_variables: None, told: str | None, ports: str | None
) -> None:
    if told is not None:
        monkeypatch.setenv("UCX_TCP_PORT_RANGE", told)
    assert NixlTransport.probe().facts.get("ports") == ports


def test_ucx_listens_where_the_ports_say(installed: None) -> None:
    program = OPEN + "t = T(O(workers=1)); print(T.probe().facts['ports'], *t._agent.ports); t.close()"
    ports, *listening = told(program, UCX_TCP_PORT_RANGE="61100-61900").stdout.split()
    assert ports == "61100-61900"
    assert listening
    assert all(61100 <= int(port) <= 61900 for port in listening)


@pytest.mark.parametrize(
    ("tls", "refused", "transports"),
    [
        ("", "", "cma, tcp"),
        ("", "Operation not permitted", "tcp"),
        ("tcp", "", "tcp"),
        ("rc,tcp", "", "tcp"),
        ("posix", "", "none"),
    ],
)
def test_the_probe_tells_what_ucx_may_use(
    installed: None, monkeypatch: pytest.MonkeyPatch, no_variables: None, tls: str, refused: str, transports: str
) -> None:
    monkeypatch.setattr(environment, "rdma_ports", dict)
    monkeypatch.setattr(environment, "copy_refused", lambda *_: refused)
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    assert NixlTransport.probe().facts["ucx_transports"] == transports


def test_over_rdma_ucx_may_use_nothing_else_unless_the_user_lets_it(
    monkeypatch: pytest.MonkeyPatch, no_variables: None, active: None
) -> None:
    assert environment.named_ways("") == "rc, ud, dc"
    monkeypatch.setenv("UCX_TLS", "all")
    assert environment.named_ways("") == "rc, ud, dc, cma, tcp"


def test_a_probe_that_cannot_be_ready_loads_nothing_and_sets_nothing(installed: None) -> None:
    if not environment.why_not_rdma()[0]:
        pytest.skip("needs rdma: a machine without an active device, to be exact")
    program = (
        "import os, sys\nbefore = dict(os.environ)\n"
        "from tensorferry.backends.nixl import NixlTransport as T\nprint(T.probe().readiness)\n"
        "print([name for name in sys.modules if name.split('_')[0] == 'nixl'], before == dict(os.environ))"
    )
    assert told(program).stdout.split("\n")[:2] == ["degraded", "[] True"]


def test_a_probe_that_starts_the_engine_leaves_no_variable_behind(installed: None) -> None:
    """As where a device is active, which it is not here: so the engine finds that it cannot use one."""
    program = (
        "import os\nbefore = dict(os.environ)\n"
        "from tensorferry.backends import _nixl_environment as environment\n"
        "environment.why_not_rdma = lambda: ('', '')\n"
        "from tensorferry.backends.nixl import NixlTransport as T\nprint(T.probe().readiness)\n"
        "print(before == dict(os.environ))"
    )
    readiness, same = told(program).stdout.split()
    assert readiness in ("unavailable", "broken") or not environment.why_not_rdma()[0]
    assert same == "True"


def test_an_idle_transport_uses_no_processor(installed: None) -> None:
    """The wheel's own choice, a delay of 0, lets the progress thread spin: 98 % of a core."""
    assert PROGRESS_US > 0
    program = OPEN + (
        "t = T(O()); carry(t)\nbefore, began = time.process_time(), time.monotonic()\ntime.sleep(1)\n"
        "print((time.process_time() - before) / (time.monotonic() - began)); t.close()"
    )
    assert float(told(program).stdout) < 0.2


def test_agents_have_names_of_their_own(one: NixlTransport) -> None:
    with NixlClosing(NixlOptions(workers=1)) as other:
        assert other._agent.name != one._agent.name


@pytest.mark.parametrize("change", ["metadata", "addresses"])
def test_a_descriptor_that_contradicts_itself_is_refused(one: NixlTransport, change: str) -> None:
    """The engine reads metadata in C++ and trusts them: what was damaged on the way never gets there."""
    fields = msgspec.msgpack.decode(one.describe())
    fields[2] = os.urandom(16)
    if change == "metadata":
        fields[13] = fields[13][:-1] + bytes([fields[13][-1] ^ 1])
    else:
        fields[14] = [1]
    with pytest.raises(errors.ProtocolViolation, match="contradicts"):
        one.connect(msgspec.msgpack.encode(fields))


def test_another_agents_metadata_are_refused_and_the_pair_goes_on(one: NixlTransport) -> None:
    with NixlClosing(NixlOptions(workers=1)) as other:
        region = other.register(other.allocate(64))
        fields = msgspec.msgpack.decode(other.describe())
        fields[2], fields[4] = os.urandom(16), "tensorferry-of-somebody-else"
        local = source(one, b"x")
        copies = [Copy(local, 0, at(region), 0, 1)]
        assert ended(one, one.post(one.connect(msgspec.msgpack.encode(fields)), copies)) is Status.FAILED
        assert ended(one, one.post(one.connect(other.describe()), copies)) is Status.DONE


def test_another_agents_metadata_take_nothing_from_that_agent(
    one: NixlTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a peer of ours: what was under way to it would be lost."""
    with NixlClosing(NixlOptions(workers=1)) as other:
        region = other.register(other.allocate(64))
        peer = one.connect(other.describe())
        copies = [Copy(source(one, b"x"), 0, at(region), 0, 1)]
        assert ended(one, one.post(peer, copies)) is Status.DONE
        forgotten: list[str] = []
        monkeypatch.setattr(Agent, "forget", lambda _, name: forgotten.append(name))
        metadata = other._agent.metadata()
        with pytest.raises(errors.TransportError, match="is not that of 'nobody'"):
            one._agent.learn("nobody", metadata)
        with pytest.raises(errors.TransportError, match="is that of"):
            one._agent.learn("nixlSerDes", metadata)  # a word that stands in them
        assert forgotten == []
        monkeypatch.setattr(Agent, "cut", lambda *_: pytest.fail("its connections were ended"))
        false = one.connect(changed(other.describe(), agent="nixlSerDes"))
        assert ended(one, one.post(false, copies)) is Status.FAILED
        assert forgotten == ["nixlSerDes"]
        assert ended(one, one.post(peer, copies)) is Status.DONE
        monkeypatch.undo()


def test_as_many_regions_are_registered_as_the_descriptor_has_room_for(
    one: NixlTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = one.allocate(4096)
    for n in range(1000):
        one.register(Memory(page.address + n, 1, "cpu", page.owner))
    assert len(one.describe()) <= MAX_DESCRIPTOR_BYTES
    monkeypatch.setattr(nixl_module, "MAX_DESCRIPTOR_BYTES", len(one.describe()))
    memory = one.allocate(64)
    with pytest.raises(errors.TransportError, match="the descriptor of 1001 regions"):
        one.register(memory)
    assert memory.address not in one._agent._memory


def test_memory_of_others_is_kept_while_a_peer_might_copy_into_it(installed: None) -> None:
    """What `allocate` gave has addresses that nobody gets again; other memory must not be freed too early."""
    with NixlClosing(NixlOptions(workers=1)) as writer:
        owner = NixlTransport(NixlOptions(workers=1))
        owner.connect(writer.describe())
        theirs = bytearray(4096)
        before = [memory.address for memories, _ in _nixl_keeping.outlived for memory in memories]
        address = ctypes.addressof(ctypes.c_char.from_buffer(theirs))
        owner.register(Memory(address, 4096, "cpu", theirs))
        owner.register(owner.allocate(4096))
        owner.close()
        kept = [memory.address for memories, _ in _nixl_keeping.outlived for memory in memories]
        assert [one for one in kept if one not in before] == [address]
        _nixl_keeping.outlived.clear()


def test_the_addresses_of_memory_that_was_given_back_are_nobody_elses(one: NixlTransport) -> None:
    address = one.allocate(1 << 20).address
    assert all(not address <= one.allocate(1 << 20).address < address + (1 << 20) for _ in range(20))
    assert environment.copy_refused(os.getpid(), address) == "Bad address"


# ---- the parts -----------------------------------------------------------------------------------------------


def test_copies_that_are_adjacent_on_both_sides_are_joined_and_long_ones_are_cut() -> None:
    here, there = object(), 1_000
    segments = [(here, there, 100 + n, 5_000 + n, 10) for n in (20, 0, 10)]
    assert cut(segments, 4096) == deque([[(100, 5_000, 30)]])
    assert cut(segments, 16) == deque([[(100, 5_000, 16)], [(116, 5_016, 14)]])


def test_scattered_copies_share_a_request_up_to_its_bytes_and_its_pieces() -> None:
    here = object()
    scattered = [(here, 0, n * 100, n * 200, 10) for n in range(MOST_PIECES + 1)]
    assert [len(batch) for batch in cut(scattered, 4096)] == [MOST_PIECES, 1]
    batches = cut(scattered[:4], 25)
    assert [[nbytes for _, _, nbytes in batch] for batch in batches] == [[10, 10, 5], [5, 10]]


def test_nothing_is_joined_across_two_registrations() -> None:
    one, other = object(), object()
    assert cut([(one, 1_000, 0, 1_000, 10), (other, 1_000, 10, 1_010, 10)], 4096) == deque(
        [[(0, 1_000, 10), (10, 1_010, 10)]]
    )
    assert cut([(one, 1_000, 0, 1_000, 10), (one, 1_010, 10, 1_010, 10)], 4096) == deque(
        [[(0, 1_000, 10), (10, 1_010, 10)]]
    )


def test_what_the_engine_cannot_start_says_which_variables_are_set(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "posix")
    monkeypatch.setenv("UCX_MODULES", "^ib")
    unfit = explain_backend("UCX", "", RuntimeError("NIXL_ERR_BACKEND"))
    assert "UCX_TLS=posix" in unfit.reason
    assert "UCX_MODULES" not in unfit.reason, "it is ours"
    assert "UCX_TLS has to hold" in unfit.hint
    monkeypatch.delenv("UCX_TLS")
    unfit = explain_backend("UCX", "", RuntimeError("NIXL_ERR_BACKEND"))
    assert "UCX_TLS" not in str(unfit) + unfit.hint
    assert "/dev/shm" in unfit.hint
    assert "UCX_LOG_LEVEL=error tensorferry doctor --debug nixl" in unfit.hint


def test_where_no_backend_is_found_the_variable_that_says_where_to_look_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NIXL_PLUGIN_DIR", "/nowhere")
    with pytest.raises(Unfit, match="no backend in NIXL_PLUGIN_DIR=/nowhere"):
        check_backend("UCX", [])


def test_a_mooncake_transport_and_a_nixl_transport_are_no_pair(one: NixlTransport) -> None:
    need("mooncake")
    other = MooncakeTransport(MooncakeOptions(host="127.0.0.1"))
    try:
        with pytest.raises(errors.ProtocolViolation, match="mooncake"):
            one.connect(other.describe())
    finally:
        other.close()


def test_an_agent_that_has_lost_itself_registers_nothing_and_says_so(installed: None) -> None:
    """In a process of its own: its connections to itself are all that is cut."""
    done = told(
        """
from tensorferry.backends._own_sockets import own_sockets
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.core.errors import TransportError
import os, socket, time

one = NixlTransport(NixlOptions(workers=1))
one.register(one.allocate(4096))
for attempt in range(200):
    with own_sockets() as sockets:
        for each in sockets:
            if not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
    try:
        one.retire(one.register(one.allocate(4096)))
    except TransportError as error:
        print(error.cause)
        break
    time.sleep(0.05)
one.close()
"""
    )
    assert "the engine does not register 4096 bytes" in done.stdout, done.stderr
    assert done.returncode == 0
