"""The runner for RDMA verbs: what it refuses and how it says so, and, where its VM is prepared, that it boots.

A wrong pass would be worst: each way in which it can fail to run something has a status of its own, never 0.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNNER = ROOT / "scripts" / "rdma-vm"
CHECK = ROOT / "scripts" / "check-rdma"
CONFORMANCE = ROOT / "scripts" / "conformance-rdma"
CANNOT = 120


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **variables}
    return subprocess.run(
        [RUNNER, *arguments], env=environ, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )


def tools(folder: Path, *, without: tuple[str, ...] = (), **scripts: str) -> str:
    """A PATH with the system's tools but some, and with scripts of these names in front of them."""
    folder.mkdir()
    for place in ("/usr/bin", "/usr/sbin"):
        for tool in Path(place).iterdir():
            if tool.name not in (*without, *scripts) and not (folder / tool.name).exists():
                (folder / tool.name).symlink_to(tool)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.fixture
def debian() -> None:
    """Other systems are refused first; that is its own test."""
    fields = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    if (fields["ID"], fields.get("VERSION_ID", "").strip('"'), os.uname().machine) != ("debian", "12", "x86_64"):
        pytest.skip(f"needs rdma: the runner's VM is made for Debian 12 on x86-64, and this is {fields['ID']}")


@pytest.fixture
def prepared(debian: None) -> None:
    """Tests prepare no VM: fetching one takes 125 MB. What runs the engines in it are `make rdma` and CI's own step."""
    if run("-q").returncode:
        pytest.skip("needs rdma: the VM is not prepared (scripts/rdma-vm -P, or make rdma)")


# ---- wrong use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        ([], "no command"),
        (["--"], "no command"),
        (["-Z", "true"], "no option -Z"),
        (["-t"], "-t wants a value"),
        (["-t", "soon", "true"], "-t wants a whole number"),
        (["-t", "0", "true"], "-t wants a whole number"),
        (["-m", "4G", "true"], "-m wants a whole number"),
        (["-c", "-1", "true"], "-c wants a whole number"),
        (["-k", "5.10", "true"], "-k wants 6.12 or 6.1"),
        (["-a", "xen", "true"], "-a wants tcg or kvm"),
        (["-o", "/nowhere", "true"], "-o wants an existing folder"),
        (["-o", "/etc/passwd", "true"], "-o wants an existing folder"),
        (["-P", "true"], "take no command"),
        (["-q", "true"], "take no command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_ends_with_2_and_says_what_was_wrong(arguments: list[str], about: str, tmp_path: Path) -> None:
    done = run(*arguments, RDMA_VM_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (2, "")
    assert about in done.stderr
    assert "usage:" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cache", ["relative", "/tmp/a,b"])
def test_a_cache_that_qemu_could_not_name_is_refused(cache: str) -> None:
    assert run("true", RDMA_VM_CACHE=cache).returncode == 2


# ---- cannot run here -----------------------------------------------------------------------------------------


def test_another_machine_is_refused(tmp_path: Path) -> None:
    done = run("true", PATH=tools(tmp_path / "bin", uname="echo arm"), RDMA_VM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == CANNOT
    assert "rdma-vm: cannot run here: this is arm on arm" in done.stderr


def test_without_root_it_says_what_root_has_to_install(debian: None, tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", without=("qemu-system-x86_64",), id="echo 1000")
    done = run("true", PATH=path, RDMA_VM_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (CANNOT, "")
    assert "sudo apt-get install --no-install-recommends" in done.stderr
    assert "qemu-system-x86" in done.stderr


def test_without_apt_it_says_so(debian: None, tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", without=("apt-get",))
    done = run("true", PATH=path, RDMA_VM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == CANNOT
    assert "apt-get is not on the PATH" in done.stderr


def test_what_apt_says_is_shown_when_it_fails(debian: None, tmp_path: Path) -> None:
    refusing = "echo 'the mirror is away' >&2; exit 100"
    path = tools(tmp_path / "bin", without=("qemu-system-x86_64",), id="echo 0", **{"apt-get": refusing})
    done = run("-P", PATH=path, RDMA_VM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == CANNOT
    assert "the mirror is away" in done.stderr
    assert "apt-get update failed" in done.stderr
    assert "then run this again" in done.stderr
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == ["apt.log", "lock"]


def test_a_cache_that_cannot_be_made_is_named(debian: None) -> None:
    done = run("-P", RDMA_VM_CACHE="/proc/no/such/place")
    assert done.returncode == CANNOT
    assert "RDMA_VM_CACHE" in done.stderr


def test_to_ask_changes_nothing(debian: None, tmp_path: Path) -> None:
    done = run("-q", RDMA_VM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == CANNOT
    assert "not prepared" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- the verdict of `make rdma` ------------------------------------------------------------------------------


def verdict_of(script: Path, folder: Path, runner: str, *arguments: str) -> tuple[int, str]:
    """Exit status and last line of a script in whose place the VM is `runner`, a line of shell."""
    scripts = folder / "scripts"
    scripts.mkdir()
    (scripts / script.name).write_text(script.read_text())
    (scripts / RUNNER.name).write_text(f'#!/bin/sh\n[ "$1" != -P ] || exit 0\n{runner}\n')
    for file in scripts.iterdir():
        file.chmod(0o755)
    command = [scripts / script.name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("runner", "status", "verdict"),
    [
        ("echo '{\"ok\": true}'", 0, "rdma: OK"),
        ("echo '{\"ok\": false}'", 1, "rdma: FAILED"),
        ("echo '{\"ok\": true}'; exit 1", 1, "rdma: FAILED"),
        ("true", 1, "rdma: FAILED"),
        ("exit 120", 3, "rdma: NOT RUN"),
        ("exit 124", 1, "rdma: FAILED"),
        ("exit 125", 1, "rdma: FAILED"),
    ],
)
def test_the_verdict_is_ok_only_when_status_and_word_agree(
    tmp_path: Path, runner: str, status: int, verdict: str
) -> None:
    (tmp_path / "tests" / "rdma").mkdir(parents=True)
    (tmp_path / "tests" / "rdma" / "mooncake_over_verbs.py").touch()  # what the runner stands in for
    said = verdict_of(CHECK, tmp_path, runner, "mooncake")
    assert said[0] == status
    assert said[1].startswith(verdict)


@pytest.mark.parametrize(
    ("runner", "status", "verdict"),
    [
        ("echo 'XFR-1   pass'", 0, "OK: mooncake conforms"),
        ("echo 'XFR-1   fail   lost a byte'; exit 1", 1, "FAILED: a rule is broken"),
        ("echo 'there is no device'; exit 3", 3, "NOT RUN: mooncake"),
        ("exit 4", 1, "FAILED: the suite"),
        ("exit 120", 3, "NOT RUN: this machine"),
        ("echo 'XFR-1   pass'; exit 124", 3, "NOT RUN TO ITS END: 1 rules passed and none failed in 7 s"),
        ("exit 124", 3, "NOT RUN TO ITS END: 0 rules passed and none failed in 7 s"),
        ("echo 'XFR-1   pass'; echo 'XFR-2   fail    short'; exit 124", 1, "FAILED: a rule is broken"),
        ("exit 125", 1, "FAILED: the VM"),
    ],
)
def test_rules_over_verbs_that_were_not_run_are_no_pass_and_one_that_failed_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str, status: int, verdict: str
) -> None:
    monkeypatch.setenv("LIMIT", "7")
    said = verdict_of(CONFORMANCE, tmp_path, runner)
    assert said[0] == status
    assert said[1].startswith(f"conformance-rdma: {verdict}")


# ---- booting -------------------------------------------------------------------------------------------------


def test_the_command_finds_the_device_and_its_status_comes_back(prepared: None, tmp_path: Path) -> None:
    inside = "ls /sys/class/infiniband; echo kept >$OUT/file; echo lost >/etc/lost; echo $MC_WORD; exit 77"
    done = run("-o", tmp_path, "--", "bash", "-c", inside, MC_WORD="it's two words")
    assert (done.returncode, done.stdout) == (77, "rxe0\nit's two words\n")
    assert (tmp_path / "file").read_text() == "kept\n"
    assert not Path("/etc/lost").exists()


def test_a_vm_that_dies_is_no_pass(prepared: None) -> None:
    done = run("bash", "-c", "echo o >/proc/sysrq-trigger; sleep 60")
    assert done.returncode == 125
    assert "rdma-vm: the VM failed" in done.stderr


def test_interrupting_it_leaves_nothing_behind(prepared: None, tmp_path: Path) -> None:
    vm = subprocess.Popen(
        [RUNNER, "-o", tmp_path, "--", "bash", "-c", "echo up; sleep 300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert vm.stdout is not None
    assert vm.stdout.readline() == "up\n"
    os.killpg(vm.pid, signal.SIGINT)
    _, said = vm.communicate(timeout=30)
    assert (vm.returncode, said) == (130, "rdma-vm: interrupted\n")
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not any(str(tmp_path).encode() in command for command in commands)
