"""The command line: what it prints, in which form, and with which exit status."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_kit import environment, on_a_terminal, tensorferry

from tensorferry import cli
from tensorferry._version import __version__
from tensorferry.commands import examining
from tensorferry.commands.examining import Examined
from tensorferry.core.settings import Settings
from tensorferry.core.transport import Probe, Readiness

ESCAPE = "\x1b["


# ---- the command itself


def test_version():
    done = tensorferry("--version")
    assert (done.returncode, done.stdout) == (0, f"tensorferry {__version__}\n")


def test_the_command_is_installed_under_its_name():
    command = Path(sys.executable).parent / "tensorferry"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tensorferry {__version__}\n"


@pytest.mark.parametrize(
    "args", [["--help"], ["demo", "--help"], ["transports", "--help"], ["config", "show", "--help"]]
)
def test_help_teaches_by_examples(args):
    done = tensorferry(*args)
    assert done.returncode == 0
    assert re.search(r"examples:\n  \S*.*tensorferry \w+", done.stdout)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["config"],
        ["demo", "--tokens", "-1"],
        ["demo", "--tokens", "many"],
        ["demo", "--rooms", "0"],
        ["demo", "--unknown"],
        ["demo", "--tok", "5"],
        ["transports", "--format", "yaml"],
        ["config", "show", "--block-size", "0"],
        ["config", "show", "--window", "sometimes"],
        ["config", "show", "--block-size", ""],
    ],
)
def test_wrong_usage_is_status_2_with_a_hint_and_no_traceback(args):
    done = tensorferry(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "hint:  " in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version_load_nothing_heavy():
    code = "import sys, tensorferry.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "rich", "zmq", "stevedore", "tokenizers", "safetensors", "numpy", "mooncake", "nixl"}
    assert {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()} & heavy == set()


# ---- config show


def test_config_show_says_where_each_value_comes_from(tmp_path):
    file = tmp_path / "tensorferry.toml"
    file.write_text("slabs = 4\n")
    env = environment(TENSORFERRY_BLOCK_SIZE="64", SGLANG_EMBEDDING_CACHE_BUFFER_SIZE="32")
    del env["TENSORFERRY_CONFIG"]
    done = tensorferry("config", "show", "--origin", "--first-grant", "4096", env=env, cwd=tmp_path)
    rows = {line.split()[0]: re.split(r"  +", line.strip()) for line in done.stdout.splitlines() if line}
    assert done.returncode == 0
    assert rows["MC_LOG_LEVEL"][1:3] == ["ERROR", "tensorferry, for mooncake"]
    assert rows["first_grant"][1:] == ["4096", "tokens", "command line --first-grant"]
    assert rows["block_size"][1:] == ["64", "tokens", "environment TENSORFERRY_BLOCK_SIZE"]
    assert rows["pool_blocks"][1:] == ["32", "blocks", "environment SGLANG_EMBEDDING_CACHE_BUFFER_SIZE"]
    assert rows["slabs"][1:] == ["4", "file tensorferry.toml: slabs"]
    assert rows["heartbeat"][1:] == ["1", "seconds", "default"]


def test_config_show_as_json():
    done = tensorferry("config", "show", "--origin", "--format", "json", "--window", "12")
    found = json.loads(done.stdout)
    assert found["status"] == "ok"
    assert found["settings"] == Settings(window=12).as_dict()
    assert found["origins"]["window"] == {"kind": "command line", "detail": "--window"}
    assert found["origins"]["slabs"] == {"kind": "default", "detail": ""}


def test_config_show_says_whose_value_an_engines_variable_has():
    done = tensorferry("config", "show", "--origin", "--format", "json", env=environment(MC_TRANSFER_TIMEOUT="77"))
    found = {v["name"]: v for v in json.loads(done.stdout)["engine_variables"]}
    assert (found["MC_TRANSFER_TIMEOUT"]["value"], found["MC_TRANSFER_TIMEOUT"]["origin"]) == ("77", "environment")
    assert found["MC_LOG_LEVEL"]["origin"] == "tensorferry, for mooncake"
    assert all(v["reason"] for v in found.values())


def test_a_bad_environment_is_an_error_with_cause_and_hint():
    env = environment(TENSORFERRY_POOL_BLOCKS="none")
    done = tensorferry("config", "show", env=env)
    assert done.returncode == 1
    assert "TENSORFERRY_POOL_BLOCKS" in done.stderr
    assert "hint:  The default is 64" in done.stderr
    done = tensorferry("config", "show", "--format", "json", env=env)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["status"] == "failed"
    assert told["error"]["code"] == "config"
    assert "TENSORFERRY_POOL_BLOCKS" in told["error"]["cause"]
    assert done.stderr == ""


def test_debug_adds_the_traceback():
    done = tensorferry("config", "show", "--debug", env=environment(TENSORFERRY_POOL_BLOCKS="none"))
    assert "Traceback" in done.stderr
    assert "error: pool_blocks must be a whole number" in done.stderr


# ---- transports


def test_a_dependency_that_cannot_be_imported_is_named_with_a_remedy(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    words = ("receive", "--room", "1", "--from", "tcp://127.0.0.1:1", "--layout", "x:int8", "-o", "f.safetensors")
    done = tensorferry(*words, env=environment(PYTHONPATH=str(tmp_path)), cwd=tmp_path)
    assert done.returncode == 3
    assert "libtorch_cpu.so" in done.stderr
    assert "pip install" in done.stderr
    assert "report" not in done.stderr


@pytest.fixture
def strange_transports(tmp_path):
    """An environment in which a distribution `oddities` provides transports that misbehave when they are imported."""
    (tmp_path / "oddities.py").write_text(
        "import os, signal, sys, time\n"
        "def __getattr__(name):\n"
        "    if name == 'Crash': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if name == 'Hang':\n"
        "        alive = os.open(os.environ['ALIVE'], os.O_WRONLY)\n"
        "        os.write(alive, b'..')\n"
        "        if os.fork() == 0: time.sleep(1000)\n"
        "        time.sleep(1000)\n"
        "    if name == 'Leave': os._exit(7)\n"
        "    if name == 'Chatty': os.write(1, b'hello from the engine\\n')\n"
        "    raise ImportError(f'no {name} here')\n"
    )
    info = tmp_path / "oddities-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: oddities\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(
        "[tensorferry.transports]\ncrash = oddities:Crash\nleave = oddities:Leave\nchatty = oddities:Chatty\n"
    )
    return environment(PYTHONPATH=str(tmp_path))


def test_transports_names_each_with_provider_status_and_reason():
    done = tensorferry("transports")
    rows = {line.split()[0]: re.split(r"  +", line) for line in done.stdout.splitlines()}
    assert done.returncode == 0
    assert rows["shm"][1:3] == [f"tensorferry {__version__}", "ready"]
    assert rows["memory"][3].startswith("only when it is named")


def test_transports_why_adds_what_was_found():
    done = tensorferry("transports", "--why")
    assert done.returncode == 0
    assert re.search(r"^shm: ready\n +provided by +tensorferry .*\n +reason +\S", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "args",
    [
        ["--peer", ""],
        ["--peer", "", "--require", "rdma"],
        ["--timeout", "nan"],
        ["--timeout", "-1"],
        ["--timeout", "0"],
        ["--timeout", "inf"],
    ],
)
def test_transports_refuses_what_cannot_be_asked(args, capsys):
    try:
        status = cli.main(["transports", *args])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert args[0] in capsys.readouterr().err


def test_a_peer_that_does_not_answer_leaves_the_local_table(monkeypatch, capsys):
    ready = Examined(Probe(Readiness.READY, ""), opened=True)
    monkeypatch.setattr(examining, "examine_each", lambda names, *_, **__: dict.fromkeys(names, ready))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"  # without a scheme, as `receive --from` takes it
        args = ["transports", "--peer", address, "--timeout", "0.2"]
        assert cli.main([*args, "--format", "json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["status"] == "failed"
        assert "tcp" in {row["name"] for row in found["transports"]}
        assert found["peer"]["address"] == f"tcp://{address}"
        assert found["peer"]["error"]["code"] == "peer_unreachable"
        assert cli.main(args) == 1
    told = capsys.readouterr()
    assert "provided by" in told.out
    assert "(peer_unreachable)" in told.err


def test_a_transport_that_crashes_or_exits_is_a_row(strange_transports):
    done = tensorferry("transports", "--format", "json", env=strange_transports)
    found = {row["name"]: row for row in json.loads(done.stdout)["transports"]}
    assert done.returncode == 0
    assert found["shm"]["status"] == "ready"
    assert (found["crash"]["status"], found["crash"]["usable"]) == ("broken", False)
    assert "SIGSEGV" in found["crash"]["reason"]
    assert "status 7" in found["leave"]["reason"]
    assert "no Chatty here" in found["chatty"]["reason"]
    assert found["leave"]["provided_by"] == [{"distribution": "oddities", "version": "0.3", "target": "oddities:Leave"}]
    assert json.loads(done.stdout)["transports"][0]["name"] == "shm"


def test_a_transport_that_hangs_is_an_answer_and_nothing_of_its_probe_is_left(
    strange_transports, monkeypatch, tmp_path
):
    (tmp_path / "oddities-0.3.dist-info" / "entry_points.txt").write_text(
        "[tensorferry.transports]\nhang = oddities:Hang\n"
    )
    os.mkfifo(tmp_path / "alive")
    monkeypatch.setenv("ALIVE", str(tmp_path / "alive"))
    monkeypatch.setenv("PYTHONPATH", strange_transports["PYTHONPATH"])
    with os.fdopen(os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as living:
        answer = examining.examine("hang", 3).probe
        assert (answer.readiness, answer.reason) == (Readiness.BROKEN, "its probe gave no answer within 3 s")
        os.set_blocking(living.fileno(), True)
        for said in (b"..", b""):  # the end is there when neither the probe nor what it forked holds the other end
            assert select.select([living], [], [], 60)[0]
            assert living.read(2) == said


def test_where_no_transport_is_usable_the_status_is_3(tmp_path):
    # A folder in front of the real metadata, which names tensorferry without any entry point.
    info = tmp_path / f"tensorferry-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorferry\nVersion: {__version__}\n")
    done = tensorferry("transports", "--format", "json", env=environment(PYTHONPATH=str(tmp_path)))
    assert (done.returncode, json.loads(done.stdout)) == (3, {"status": "failed", "transports": []})


# ---- colour


def test_a_terminal_gets_a_drawn_table():
    status, said = on_a_terminal("config", "show")
    assert status == 0
    assert ESCAPE in said


@pytest.mark.parametrize("more", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_none_is_wanted(more):
    status, said = on_a_terminal("config", "show", env=environment(**{"TERM": "xterm-256color", **more}))
    assert status == 0
    colours = re.findall(r"\x1b\[([\d;]*)m", said)
    assert {code for part in colours for code in part.split(";")} <= {"", "0", "1", "2"}


def test_no_colour_without_a_terminal():
    for args in (["config", "show"], ["transports", "--why"]):
        assert ESCAPE not in tensorferry(*args).stdout


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m tensorferry config show --format json | head -c 1"
    done = subprocess.run(["sh", "-c", command], env=environment(), capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "args", [["config", "show"], ["config", "show", "--format", "json"], ["--help"], ["--version"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_said_and_is_no_defect_of_ours(args, unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tensorferry", *args],
            env=environment(PYTHONUNBUFFERED=unbuffered), stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "error: standard output cannot be written to: No space left on device" in done.stderr
    assert "report" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


@pytest.mark.parametrize(
    ("wanted", "status"),
    [("--format json >/dev/full", 1), ("--format json --slabs 0 >/dev/full", 1), ("--slabs 0", 2), ("--debug", 0)],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_error_that_cannot_be_said_leaves_its_status(wanted, status, unbuffered):
    command = f"{sys.executable} -m tensorferry config show {wanted} 2>/dev/full"
    env = environment(PYTHONUNBUFFERED=unbuffered)
    assert subprocess.run(["sh", "-c", command], env=env, check=False).returncode == status


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("wanted", "status"), [("config show --origin", 0), ("doctor shm", 0), ("doctor nothing", 2)])
def test_with_streams_that_are_closed_the_status_says_it(wanted, status, closed):
    command = f"{sys.executable} -m tensorferry {wanted} {closed}"
    done = subprocess.run(["sh", "-c", command], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert "Traceback" not in done.stderr
    assert "report" not in done.stderr
