"""`tensorferry doctor`: what is taken away, crashes, hangs or listens is told, with what helps.

Long because the ladder of RDMA has eight rungs, and each is taken away once.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_kit import environment, on_a_terminal, tensorferry
from jsonschema import Draft202012Validator

from tensorferry import schemas
from tensorferry.commands import exposure, host_facts, listening, rdma_facts
from tensorferry.commands.doctor import diagnose
from tensorferry.commands.examining import Examined, Verbs, examine
from tensorferry.commands.findings import Finding, Severity
from tensorferry.commands.listening import Listener, Scope
from tensorferry.commands.output import Exit
from tensorferry.commands.rdma_facts import Ground, State
from tensorferry.commands.surveying import survey
from tensorferry.core.errors import TransportUnavailable
from tensorferry.core.settings import Settings
from tensorferry.core.transport import Probe, Readiness
from tensorferry.plugins.registry import Plugin

SCHEMA = schemas.load("doctor")


def doctor(*args: str, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    done = tensorferry("doctor", "--format", "json", *args, env=env)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    Draft202012Validator(SCHEMA).validate(told)
    assert set(told) <= set(SCHEMA["properties"])
    assert (told["status"] == "ok") is (done.returncode == 0)
    return done.returncode, told


def about(told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [finding for finding in told["findings"] if finding["about"] == name]


# ---- transports that misbehave -----------------------------------------------------------------------------------


ODDITIES = """
import os, sys, time
from tensorferry.backends.memory import MemoryTransport
from tensorferry.core.transport import Probe, Readiness

class Odd(MemoryTransport):
    contract_version = 1
    @classmethod
    def probe(cls):
        return Probe(Readiness.READY, "for now", facts={"engine": "7"}, path="tcp")

class Aborts(Odd):
    name = "aborts"
    @classmethod
    def probe(cls):
        os.write(2, b"F1121 10:00:00 engine.cc:7 unknown scheme\\n")
        os.abort()

class Hangs(Odd):
    name = "hangs"
    @classmethod
    def probe(cls):
        time.sleep(1000)

class Prints(Odd):
    name = "prints"
    @classmethod
    def probe(cls):
        os.write(1, b"\\xff{garbage\\n")
        return "all is well"

class Raises(Odd):
    name = "raises"
    @classmethod
    def probe(cls):
        raise RuntimeError("no such engine")

class Missing(Odd):
    name = "missing"
    @classmethod
    def probe(cls):
        return Probe(Readiness.UNAVAILABLE, "it needs libodd.so.1", "apt-get install libodd1", {"engine": "7"})

class Exits(Odd):
    name = "exits"
    def __init__(self, options):
        raise SystemExit("not on \\n this host")

class OpensBadly(Odd):
    name = "opensbadly"
    def __init__(self, options):
        os.write(2, b"terminate called: no more pages\\n")
        os.abort()

class Refuses(Odd):
    name = "refuses"
    def __init__(self, options):
        raise OSError("out of queue pairs:\\n\\x1b[31mall 8")

class OpensSlowly(Odd):
    name = "opensslowly"
    def __init__(self, options):
        time.sleep(1000)
"""


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, str]:
    """An environment in which a distribution `oddities` provides transports that misbehave."""
    (tmp_path / "oddities.py").write_text(ODDITIES)
    info = tmp_path / "oddities-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: oddities\nVersion: 0.3\n")
    names = ["Aborts", "Hangs", "Prints", "Raises", "Missing", "OpensBadly", "Refuses", "OpensSlowly", "Exits"]
    entries = "\n".join(f"{name.lower()} = oddities:{name}" for name in names)
    (info / "entry_points.txt").write_text(f"[tensorferry.transports]\n{entries}\n")
    return environment(PYTHONPATH=str(tmp_path))


def test_each_probe_that_misbehaves_is_a_row_and_a_problem_and_the_others_answer(odd: dict[str, str]) -> None:
    names = ["aborts", "prints", "raises", "missing", "opensbadly", "refuses", "exits", "shm"]
    status, told = doctor(*names, env=odd)
    found = {one["name"]: one for one in told["transports"]}
    assert status == 1
    assert list(found) == names
    assert {name: one["status"] for name, one in found.items()} == {
        "aborts": "broken", "prints": "broken", "raises": "broken", "missing": "unavailable",
        "opensbadly": "ready", "refuses": "ready", "exits": "ready", "shm": "ready",
    }  # fmt: skip
    assert found["aborts"]["reason"] == "its probe was ended by SIGABRT"
    assert "unknown scheme" in found["aborts"]["facts"]["last_words"]
    assert found["prints"]["reason"] == "its probe answered with a str"
    assert found["raises"]["reason"] == "its probe raised RuntimeError: no such engine"
    assert found["opensbadly"]["refused"] == "opening it: its process was ended by SIGABRT"
    assert "out of queue pairs" in found["refuses"]["refused"]
    assert "\\n" not in json.dumps([found["refuses"]["refused"], found["exits"]["refused"]]), "a row is one line"
    for name in ("opensbadly", "refuses", "exits"):
        assert f"--debug {name}" in about(told, name)[0]["remedy"]
    assert "no more pages" in about(told, "opensbadly")[0]["what"]
    assert found["shm"]["opened"]
    for name in names[:-1]:
        assert "problem" in {finding["severity"] for finding in about(told, name)}, name
    assert about(told, "missing")[0]["remedy"] == "apt-get install libodd1"


def test_a_probe_or_an_opening_that_hangs_is_a_row_in_time(odd: dict[str, str]) -> None:
    status, told = doctor("hangs", "opensslowly", "--timeout", "3", env=odd)
    found = {one["name"]: one for one in told["transports"]}
    assert status == 3  # neither works
    assert found["hangs"]["reason"] == "its probe gave no answer within 3 s"
    assert "--timeout" in found["hangs"]["hint"]
    assert (found["opensslowly"]["status"], found["opensslowly"]["opened"]) == ("ready", False)
    assert found["opensslowly"]["refused"] == "opening it: its process gave no answer within 3 s"


def test_a_child_that_cannot_be_started_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found = examine("shm", 3)
    assert found.probe.readiness is Readiness.BROKEN
    assert "could not be started" in found.probe.reason
    assert "no transport's fault" in found.probe.hint
    with pytest.raises(TransportUnavailable) as nothing_asked:
        survey("tcp://127.0.0.1:1", Settings(), 3)
    assert "no transport's fault" in nothing_asked.value.hint
    assert host_facts.copy_between_processes().severity is Severity.NOTE


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


# ---- the command -------------------------------------------------------------------------------------------------


def test_this_host_is_examined_and_what_listens_is_told() -> None:
    status, told = doctor("tcp", "shm", "memory")
    found = {one["name"]: one for one in told["transports"]}
    assert status == 0
    assert [(li["protocol"], li["scope"]) for li in found["tcp"]["listens"]] == [("tcp", "all interfaces")]
    assert [li["protocol"] for li in found["shm"]["listens"]] == ["unix"]
    assert found["memory"]["listens"] == []
    assert any("128 bits" in f["what"] and f["severity"] == "note" for f in about(told, "tcp"))
    assert told["firewall"] == ""
    assert {"kernel", "memory", "locked memory (ulimit -l)", "interface lo"} <= set(told["host"])
    assert about(told, "cma")
    assert told["rdma"]["steps"][0]["step"] == "device"


def test_mooncake_that_lets_anybody_in_is_a_warning_with_rules_for_a_firewall() -> None:
    pytest.importorskip("mooncake")
    status, told = doctor(
        "mooncake", env=environment(MC_FORCE_TCP="1", MC_MIN_RPC_PORT="21000", MC_MAX_RPC_PORT="21400")
    )
    (one,) = told["transports"]
    assert status == 0
    assert {li["scope"] for li in one["listens"]} == {"all interfaces"}
    assert len(one["listens"]) == 2
    assert all(21000 <= li["port"] <= 21400 for li in one["listens"])
    (warning,) = [f for f in about(told, "mooncake") if "lets anybody in" in f["what"]]
    assert warning["severity"] == "warning"
    assert "none: whoever can connect" in warning["what"]
    assert "not offered" in warning["remedy"]
    assert "tcp dport { 21000-21400 } drop" in told["firewall"]
    degraded = [f for f in about(told, "mooncake") if "degraded" in f["what"]]
    assert "MC_FORCE_TCP is set" in degraded[0]["what"]


@pytest.mark.parametrize("wrong", [["tpc"], ["--timeout", "0"], ["--timeout", "soon"]])
def test_wrong_usage_is_status_2_with_a_hint(wrong: list[str]) -> None:
    done = tensorferry("doctor", *wrong)
    assert done.returncode == 2
    assert "hint:" in done.stderr
    if wrong == ["tpc"]:
        assert "Did you mean 'tcp'?" in done.stderr


def test_for_people_it_is_plain_lines_without_a_terminal_and_drawn_on_one() -> None:
    done = tensorferry("doctor", "shm")
    assert done.returncode == 0
    for heading in ("this host", "transports", "open ports", "why not RDMA?", "findings"):
        assert f"\n== {heading}" in done.stdout
    assert "\x1b[" not in done.stdout
    assert done.stdout.rstrip().splitlines()[-1]
    status, said = on_a_terminal("doctor", "shm")
    assert status == 0
    assert "\x1b[" in said


def test_help_teaches() -> None:
    done = tensorferry("doctor", "--help")
    assert "examples:\n  tensorferry doctor" in done.stdout
    assert "exit status: 0 no problem, 1 problems, 2 wrong usage, 3 no transport works" in done.stdout
    assert "tensorferry doctor" in tensorferry("--help").stdout


def unshare_works() -> bool:
    if os.geteuid() or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not unshare_works(), reason="needs root and mount namespaces")
def test_a_library_that_is_taken_away_is_named_with_its_package() -> None:
    pytest.importorskip("mooncake")
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    paths = [line.rpartition("=> ")[2] for line in found.splitlines() if "libcurl.so.4 " in line]
    if not paths:
        pytest.skip("libcurl.so.4 is not where ldconfig knows of it")
    hide = " && ".join(f"mount --bind /dev/null {path}" for path in paths)
    command = f"{hide} && exec {sys.executable} -m tensorferry doctor --format json mooncake tcp"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], env=environment(), capture_output=True, text=True, check=False
    )
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert any("libcurl.so.4" in f["what"] and "libcurl4" in f["remedy"] for f in about(told, "mooncake"))


# ---- who can connect ---------------------------------------------------------------------------------------------


def test_each_listening_socket_says_who_can_reach_it() -> None:
    before = listening.own_sockets()
    addresses = {"lo": ["127.0.0.1", "::1"], "eth7": ["127.0.0.2"]}
    with (
        socket.create_server(("127.0.0.1", 0)) as host,
        socket.create_server(("", 0)) as anybody,
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.create_connection(host.getsockname()),
    ):
        datagrams.bind(("127.0.0.1", 0))
        found = {one.port: one for one in listening.own_listeners(but=before, interfaces=addresses)}
        assert found[host.getsockname()[1]].who == "this host"
        assert found[anybody.getsockname()[1]].scope is Scope.ALL
        assert found[both.getsockname()[1]].scope is Scope.ALL
        assert found[datagrams.getsockname()[1]].protocol == "udp"
        assert len(found) == 4


def test_without_proc_what_listens_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_mounted(path: str) -> list[str]:
        raise FileNotFoundError(2, "No such file or directory", path)

    before = listening.own_sockets()
    with socket.create_server(("127.0.0.1", 0)) as host:
        monkeypatch.setattr(os, "listdir", not_mounted)
        assert listening.own_sockets() > before
        (found,) = listening.own_listeners(but=before)
        assert found.port == host.getsockname()[1]
    (told,) = [one for one in host_facts.findings(tmp_path, FINE) if one.about == "proc"]
    assert "mount -t proc" in told.remedy
    assert not [one for one in host_facts.findings(cma=FINE) if one.about == "proc"]


def test_a_socket_bound_to_one_address_names_its_interface() -> None:
    assert listening._scope("10.0.0.5", False, {"eth0": ["10.0.0.5"], "eth1": ["10.1.0.5"]}) == (
        Scope.INTERFACES,
        ("eth0",),
    )
    assert listening._scope("10.9.9.9", False, {}) == (Scope.INTERFACES, ("10.9.9.9",))


ANYWHERE = Listener("tcp", "0.0.0.0", 15001, Scope.ALL, ("eth0",))
HERE = Listener("tcp", "127.0.0.1", 15002, Scope.HOST)


def listens(*listeners: Listener, **facts: str) -> Examined:
    return Examined(Probe(Readiness.READY, "works", facts=facts), True, "tcp", listeners)


@pytest.mark.parametrize(
    ("one", "severity"),
    [
        (listens(ANYWHERE, authentication="none: walk in"), Severity.WARNING),
        (listens(ANYWHERE), Severity.WARNING),  # nobody says how callers are told apart
        (listens(ANYWHERE, authentication="a token"), Severity.NOTE),
        (listens(HERE, authentication="none: walk in"), Severity.OK),
    ],
)
def test_an_open_port_is_as_bad_as_its_door(one: Examined, severity: Severity) -> None:
    (found,) = exposure.findings({"acme": one})
    assert found.severity is severity


def test_the_firewall_keeps_the_ports_for_the_peers_and_for_nobody_else() -> None:
    udp = Listener("udp", "0.0.0.0", 999, Scope.ALL)
    open_one = listens(ANYWHERE, udp, HERE, authentication="none: walk in")
    rules = exposure.firewall({"acme": open_one, "other": listens(ANYWHERE)}, ["10.0.0.0/24", "fd00::/64"])
    assert "elements = { 10.0.0.0/24 }" in rules
    assert "tcp dport { 15001 } ip saddr @peers4 accept" in rules
    assert "tcp dport { 15001 } ip6 saddr @peers6 accept" in rules
    assert rules.index("@peers4 accept") < rules.index("tcp dport { 15001 } drop")
    assert "udp dport { 999 } drop" in rules
    assert "15002" not in rules
    assert rules.count("{") == rules.count("}")
    alone = exposure.firewall({"acme": open_one}, [])
    assert "@peers" not in alone
    assert "tcp dport { 15001 } drop" in alone
    assert exposure.firewall({"acme": listens(HERE, authentication="none")}, []) == ""


def test_a_range_is_believed_only_if_what_was_seen_lies_in_it() -> None:
    told = {"authentication": "none: walk in"}
    within = listens(ANYWHERE, **told, ports="5555, 15000-17000")
    assert "tcp dport { 5555, 15000-17000 } drop" in exposure.firewall({"acme": within}, [])
    assert len(exposure.findings({"acme": within})) == 1
    for wrong in ("16000-17000", "17000-15000", "15001 }; accept", "any", "15000-99999"):
        outside = listens(ANYWHERE, **told, ports=wrong)
        rules = exposure.firewall({"acme": outside}, [])
        assert "tcp dport { 15001 } drop" in rules
        assert wrong not in rules
        open_door, liar = exposure.findings({"acme": outside})
        assert "(15001)" in open_door.remedy
        assert (liar.severity, wrong in liar.what, "15001" in liar.what) == (Severity.WARNING, True, True)


def test_ports_that_are_others_each_time_make_no_rule_but_a_remedy() -> None:
    seen = Listener("tcp", "0.0.0.0", 41011, Scope.ALL, ("eth0",))
    told = {"authentication": "none: walk in"}
    free = listens(seen, **told)
    assert exposure.firewall({"nixl": free}, ["10.0.0.0/24"]) == ""
    (found,) = exposure.findings({"nixl": free})
    assert "set UCX_TCP_PORT_RANGE=17100-17200 (two ports for each worker), then ask again" in found.remedy
    assert "41011" not in found.remedy
    both = exposure.firewall({"acme": listens(ANYWHERE, **told), "nixl": free}, [])
    assert "# Not in here: nixl" in both
    assert "41011" not in both
    fixed = listens(Listener("tcp", "0.0.0.0", 17101, Scope.ALL), **told, ports="17100-17200")
    assert "tcp dport { 17100-17200 } drop" in exposure.firewall({"nixl": fixed}, [])


# ---- RDMA, from files --------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


ZERO = "0000:0000:0000:0000:0000:0000:0000:0000"
LINK_LOCAL = "fe80:0000:0000:0000:0e42:a1ff:fe00:0001"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0005"


def device(
    root: Path, name: str, number: int, state: str, gids: dict[int, tuple[str, str]], layer: str = "Ethernet"
) -> None:
    base = root / "sys/class/infiniband" / name
    port = base / "ports/1"
    write(base / "fw_ver", "20.31.1014")
    write(port / "state", state)
    write(port / "phys_state", "5: LinkUp" if "ACTIVE" in state else "3: Disabled")
    write(port / "link_layer", layer)
    write(port / "rate", "100 Gb/sec (4X EDR)")
    for index in range(3):
        value, kind = gids.get(index, (ZERO, ""))
        write(port / "gids" / str(index), value)
        if kind:
            write(port / "gid_attrs/types" / str(index), kind)
            write(port / "gid_attrs/ndevs" / str(index), "eth0")
    drivers = root / "sys/drivers/mlx5_core"
    drivers.mkdir(parents=True, exist_ok=True)
    (base / "device").mkdir()
    (base / "device/driver").symlink_to(drivers)
    write(root / f"sys/class/infiniband_verbs/uverbs{number}/ibdev", name)
    write(root / f"dev/infiniband/uverbs{number}", "")


ROCE = {0: (LINK_LOCAL, "IB/RoCE v1"), 1: (IPV4, "RoCE v2")}


@pytest.fixture
def two_devices(tmp_path: Path) -> Path:
    device(tmp_path, "mlx5_0", 0, "4: ACTIVE", ROCE)
    device(tmp_path, "mlx5_1", 1, "1: DOWN", {})
    return tmp_path


def test_devices_are_read_with_ports_states_and_gids(two_devices: Path) -> None:
    up, down = rdma_facts.devices(two_devices)
    assert (up.name, up.driver, up.firmware, up.character_device, up.active) == (
        "mlx5_0", "mlx5_core", "20.31.1014", "/dev/infiniband/uverbs0", True,
    )  # fmt: skip
    assert [str(gid) for gid in up.ports[0].gids] == [
        "0: fe80::e42:a1ff:fe00:1 (RoCE v1, eth0)",
        "1: ::ffff:10.0.0.5 (RoCE v2, eth0)",
    ]
    assert str(up.ports[0]) == "port 1 ACTIVE (LinkUp, Ethernet, 100 Gb/sec (4X EDR))"
    assert (down.name, down.active, down.ports[0].gids) == ("mlx5_1", False, ())


def test_a_subnet_prefix_alone_is_no_gid(tmp_path: Path) -> None:
    device(tmp_path, "ib0", 0, "4: ACTIVE", {0: ("fe80:0000:0000:0000:0000:0000:0000:0000", "")}, "InfiniBand")
    assert rdma_facts.devices(tmp_path)[0].ports[0].gids == ()


def engine(path: str = "rdma", readiness: Readiness = Readiness.READY, **more: Any) -> Examined:
    probe = Probe(
        readiness, more.pop("reason", "works"), more.pop("hint", "do this"), more.pop("facts", {"engine": "1.2"})
    )
    return Examined(probe, probe.usable and not more.get("refused"), path, **more)


def ground(root: Path, **changed: Any) -> Ground:
    settings = {
        "devices": rdma_facts.devices(root),
        "verbs": lambda: Verbs(("mlx5_0",)),
        "engines": {"mooncake": engine()},
        "memlock": host_facts.UNLIMITED,
        "may_lock": False,
        "root": root,
    }
    return Ground(**{**settings, **changed})


def missing(of: Ground) -> rdma_facts.Step:
    steps = rdma_facts.why_not(of)
    (found,) = [step for step in steps if step.state is State.MISSING]
    at = steps.index(found)
    assert {step.state for step in steps[:at]} <= {State.OK}
    assert {step.state for step in steps[at + 1 :]} <= {State.NOT_REACHED}
    assert found.remedy
    assert rdma_facts.answer(steps) == f"no RDMA: {found.found}"
    return found


def test_where_nothing_is_missing_every_rung_says_what_it_found(two_devices: Path) -> None:
    steps = rdma_facts.why_not(ground(two_devices))
    assert {step.state for step in steps} == {State.OK}
    assert rdma_facts.answer(steps) == "RDMA works: mooncake goes over it, by the engine's own word"
    assert "not active: mlx5_1" in steps[1].found
    assert "::ffff:10.0.0.5 (RoCE v2" in steps[2].found


def test_no_device(tmp_path: Path) -> None:
    found = missing(ground(tmp_path))
    assert found.name == "device"
    assert "rdma_rxe" in found.remedy
    write(tmp_path / ".dockerenv", "")
    assert "--device=/dev/infiniband" in missing(ground(tmp_path)).remedy


def test_a_card_without_its_kernel_module(tmp_path: Path) -> None:
    card = tmp_path / "sys/bus/pci/devices/0000:3b:00.0"
    write(card / "class", "0x020000")
    write(card / "vendor", "0x15b3")
    (tmp_path / "sys/drivers/mlx5_core").mkdir(parents=True)
    (card / "driver").symlink_to(tmp_path / "sys/drivers/mlx5_core")
    found = missing(ground(tmp_path))
    assert "0000:3b:00.0" in found.found
    assert "modprobe mlx5_ib" in found.remedy


@pytest.mark.parametrize(("state", "helps"), [("1: DOWN", "ip link set"), ("2: INIT", "subnet manager")])
def test_no_active_port(tmp_path: Path, state: str, helps: str) -> None:
    device(tmp_path, "mlx5_0", 0, state, ROCE)
    found = missing(ground(tmp_path))
    assert (found.name, helps in found.remedy) == ("port", True)


def test_no_gid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(tmp_path, "mlx5_0", 0, "4: ACTIVE", {})
    assert missing(ground(tmp_path)).name == "GID"
    device(tmp_path, "mlx5_2", 2, "4: ACTIVE", ROCE)
    monkeypatch.setenv("MC_GID_INDEX", "9")
    assert "MC_GID_INDEX=9" in missing(ground(tmp_path)).found


def test_no_character_device(two_devices: Path) -> None:
    (two_devices / "dev/infiniband/uverbs0").unlink()
    found = missing(ground(two_devices))
    assert found.name == "permission"
    assert "/dev/infiniband/uverbs0 (mlx5_0): No such file" in found.found
    shutil.rmtree(two_devices / "sys/class/infiniband_verbs")
    assert "ib_uverbs" in missing(ground(two_devices)).found


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root opens everything")
def test_a_character_device_that_this_user_may_not_open(two_devices: Path) -> None:
    for folder in (two_devices, *two_devices.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/") and not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    (two_devices / "dev/infiniband/uverbs0").chmod(0o600)
    code = (
        "import sys; from pathlib import Path; from tensorferry.commands import rdma_facts as r\n"
        "root = Path(sys.argv[1])\n"
        "step = r._has_permission(r.Ground(r.devices(root), lambda: None, {}, 0, False, root))\n"
        "print(step)"
    )
    alone = ["setpriv", "--reuid", "65534", "--clear-groups"] if os.geteuid() == 0 else []
    if not alone:
        (two_devices / "dev/infiniband/uverbs0").chmod(0)
    done = subprocess.run(
        [*alone, sys.executable, "-c", code, str(two_devices)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"another user cannot run this Python: {done.stderr.strip().splitlines()[-1]}")
    assert "Permission denied" in done.stdout


def test_no_user_space_driver(two_devices: Path) -> None:
    found = missing(ground(two_devices, verbs=lambda: Verbs()))
    assert (found.name, "ibverbs-providers" in found.remedy) == ("user-space driver", True)
    gone = Verbs(problem="libibverbs.so.1: cannot open shared object file")
    assert "libibverbs1" in missing(ground(two_devices, verbs=lambda: gone)).remedy


def test_no_locked_memory(two_devices: Path) -> None:
    found = missing(ground(two_devices, memlock=8 << 20))
    assert (found.name, "LimitMEMLOCK" in found.remedy) == ("locked memory", True)
    assert rdma_facts.why_not(ground(two_devices, memlock=8 << 20, may_lock=True))[-1].state is State.OK
    assert rdma_facts.why_not(ground(two_devices, memlock=1 << 30))[-1].state is State.OK


def test_no_engine(two_devices: Path) -> None:
    absent = engine(readiness=Readiness.UNAVAILABLE, facts={}, hint="pip install it")
    found = missing(ground(two_devices, engines={"mooncake": absent}))
    assert (found.name, found.remedy) == ("engine", "mooncake: pip install it")
    broken = engine(readiness=Readiness.UNAVAILABLE, reason="libcurl is missing", hint="apt-get")
    found = missing(ground(two_devices, engines={"mooncake": broken}))
    assert (found.found, found.remedy) == ("mooncake does not work: libcurl is missing", "apt-get")
    refused = engine(refused="out of queue pairs")
    assert "out of queue pairs" in missing(ground(two_devices, engines={"mooncake": refused})).found


def test_the_engines_own_word_is_the_last(two_devices: Path) -> None:
    tcp = engine("tcp", Readiness.DEGRADED, reason="works over TCP: MC_FORCE_TCP is set", hint="Unset MC_FORCE_TCP")
    found = missing(ground(two_devices, engines={"mooncake": tcp}))
    assert (found.name, found.remedy) == ("engine's own word", "Unset MC_FORCE_TCP")
    assert "MC_FORCE_TCP is set" in found.found


def test_without_a_question_about_an_engine_none_is_missed(two_devices: Path) -> None:
    steps = rdma_facts.why_not(ground(two_devices, engines={}))
    assert [step.state for step in steps[-2:]] == [State.NOT_REACHED] * 2
    assert rdma_facts.answer(steps) == "nothing that was looked at stands against RDMA; engine was not"


# ---- the diagnosis -----------------------------------------------------------------------------------------------


FINE = Finding(Severity.OK, "cma", "works")
SERVES = {"shm": Examined(Probe(Readiness.READY, "works"), True, "memcpy")}


def report(
    root: Path,
    examined: dict[str, Examined],
    *,
    named: bool = False,
    verbs: Verbs | None = None,
    settings: Settings | None = None,
) -> Any:
    verbs = verbs or Verbs(("mlx5_0",))
    plugins = {name: [Plugin(name, "acme", "1", "acme:It")] for name in examined}
    made = diagnose(plugins, examined, named=named, root=root, verbs=verbs, cma=FINE, settings=settings)
    Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(made.as_dict())))
    return made


def severities(of: Any, name: str) -> list[str]:
    return [str(f.severity) for f in of.findings if f.about == name]


def test_an_engine_that_nobody_installed_is_a_note_and_one_that_was_named_a_problem(tmp_path: Path) -> None:
    absent = engine(readiness=Readiness.UNAVAILABLE, facts={})
    assert severities(report(tmp_path, {**SERVES, "mooncake": absent}), "mooncake") == ["note"]
    found = report(tmp_path, {**SERVES, "mooncake": absent}, named=True)
    assert severities(found, "mooncake") == ["problem"]
    assert found.exit is Exit.FAILED
    assert report(tmp_path, {"mooncake": absent}).exit is Exit.CANNOT_RUN_HERE
    installed = engine(readiness=Readiness.UNAVAILABLE)
    assert severities(report(tmp_path, {**SERVES, "mooncake": installed}), "mooncake") == ["problem"]


def test_without_a_device_rdma_is_a_note_and_with_one_whatever_keeps_it_unused_is_a_problem(two_devices: Path) -> None:
    none = report(two_devices / "nothing", SERVES)
    assert (severities(none, "rdma"), none.exit) == (["note"], Exit.OK)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = report(two_devices, {**SERVES, "mooncake": engine()}, verbs=Verbs())
    assert severities(found, "rdma") == ["problem", "warning"]  # no driver; and mlx5_1 is down
    assert found.exit is Exit.FAILED
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == limit
    assert "RDMA device mlx5_0" in found.host


def test_an_engine_that_falls_back_without_a_word_is_a_problem(two_devices: Path) -> None:
    probe = Probe(Readiness.READY, "an active RDMA device is there", facts={"engine": "1"}, path="rdma")
    found = report(two_devices, {**SERVES, "mooncake": Examined(probe, True, "tcp")})
    assert severities(found, "mooncake") == ["problem"]
    (said,) = [f for f in found.findings if f.about == "mooncake"]
    assert "its probe finds rdma" in said.what
    assert "open it goes over tcp" in said.what
    assert found.exit is Exit.FAILED


def test_gpus_without_a_way_for_the_card_to_their_memory_are_a_note(two_devices: Path) -> None:
    write(two_devices / "proc/driver/nvidia/version", "NVRM version: 550")
    write(two_devices / "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA H200\nIRQ: 5")
    found = report(two_devices, SERVES)
    assert found.host["GPUs"] == "NVIDIA H200"
    assert any("nvidia_peermem" in f.what for f in found.findings if f.severity is Severity.NOTE)
    (two_devices / "sys/module/nvidia_peermem").mkdir(parents=True)
    assert not any("nvidia_peermem" in f.what for f in report(two_devices, SERVES).findings)


@pytest.mark.parametrize(
    ("env", "file", "says"),
    [
        ({"TENSORFERRY_BOGUS": "1"}, "", "TENSORFERRY_BOGUS"),
        ({}, "slabs = none\n", "is not TOML"),
        ({"TENSORFERRY_TRANSPORT": "teleport"}, "", "transport is teleport"),
    ],
)
def test_settings_that_every_endpoint_refuses_are_a_problem(
    tmp_path: Path, env: dict[str, str], file: str, says: str
) -> None:
    (tmp_path / "tensorferry.toml").write_text(file)
    status, told = doctor("shm", env=environment(**env, TENSORFERRY_CONFIG=str(tmp_path / "tensorferry.toml")))
    (found,) = about(told, "settings")
    assert (status, found["severity"]) == (1, "problem")
    assert says in found["what"]
    assert found["remedy"]


def test_what_the_settings_want_and_is_not_here_is_a_problem(tmp_path: Path) -> None:
    wanted = {"settings": Settings(require="rdma")}
    assert severities(report(tmp_path, SERVES, **wanted), "settings") == ["problem"]
    assert severities(report(tmp_path, {**SERVES, "mooncake": engine("rdma")}, **wanted), "settings") == []
    other = report(tmp_path, {**SERVES, "mooncake": engine("rdma")}, settings=Settings(require="rdma", transport="shm"))
    assert severities(other, "settings") == ["problem"]
    absent = engine(readiness=Readiness.UNAVAILABLE, facts={})
    named = report(tmp_path, {**SERVES, "mooncake": absent}, settings=Settings(transport="mooncake"))
    assert severities(named, "mooncake") == ["problem"]


def test_what_works_in_one_process_alone_counts_only_where_nothing_else_was_asked_for(tmp_path: Path) -> None:
    works = Examined(Probe(Readiness.READY, "works"), True, "memcpy")
    absent = engine(readiness=Readiness.UNAVAILABLE)
    assert report(tmp_path, {"memory": works}).exit is Exit.OK
    assert report(tmp_path, {"memory": works, "mooncake": absent}).exit is Exit.CANNOT_RUN_HERE


# ---- the host ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/pod/app", {"sys/fs/cgroup/pod/memory.max": "1000", "sys/fs/cgroup/pod/app/memory.max": "max"}, 1000),
        ("0::/", {"sys/fs/cgroup/memory.max": "2000"}, 2000),
        ("4:cpu,memory:/a", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3000"}, 3000),
        ("4:memory:/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 0),
        ("", {}, 0),
    ],
)
def test_the_least_limit_of_the_control_groups_counts(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int
) -> None:
    write(tmp_path / "proc/self/cgroup", groups)
    for name, value in files.items():
        write(tmp_path / name, value)
    assert host_facts.memory_limit(tmp_path) == limit


def test_copies_between_processes_are_tried_and_a_refusal_says_what_helps(tmp_path: Path) -> None:
    assert host_facts.copy_between_processes(tmp_path, "yes").severity is Severity.OK
    write(tmp_path / "proc/sys/kernel/yama/ptrace_scope", "1")
    found = host_facts.copy_between_processes(tmp_path, "Operation not permitted")
    assert found.severity is Severity.NOTE
    assert "ptrace_scope is 1" in found.what
    assert "kernel.yama.ptrace_scope=0" in found.remedy
    assert host_facts._read_sibling() in ("yes", "Operation not permitted", "Function not implemented")


def test_loopback_that_is_down_is_a_warning_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for state, severities in (("unknown", []), ("down", [Severity.WARNING])):
        lo = host_facts.Interface("lo", ("::1/128",), 65536, state)
        eth = host_facts.Interface("eth0", ("10.0.0.5/24",), 1500, "up")
        monkeypatch.setattr(host_facts, "interfaces", lambda _, found=(lo, eth): list(found))
        everything = host_facts.findings(cma=Finding(Severity.OK, "cma", "not tried"))
        found = [one for one in everything if one.about == "network"]
        assert [one.severity for one in found] == severities
    assert "ip link set lo up" in found[0].remedy


def test_a_small_memory_is_noted_with_the_setting_that_exceeds_it(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\nHugePages_Total: 3")
    found = host_facts.findings(tmp_path, FINE, Settings())
    assert any("destination_budget" in f.what for f in found)
    found = host_facts.findings(tmp_path, FINE, Settings(destination_budget=64 << 20))
    assert not any("destination_budget" in f.what for f in found), "what was set counts"
    assert "reserved: 3" in host_facts.facts(tmp_path)["huge pages"]
