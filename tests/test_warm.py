"""A warm process is a process: what tests ask of one is true of the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm


def run(folder: Path, code: str, *arguments: str, popen: type = warm.Popen, **more: object) -> tuple[int, str, str]:
    program = folder / "program.py"
    program.write_text(code)
    words = [sys.executable, str(program), *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with popen(words, text=True, **pipes, **more) as process:
        out, err = process.communicate("heard", timeout=60)
    return process.returncode, out, err


SAYS = """
import os, sys
print(sys.argv[1:], sys.stdin.read(), os.getcwd(), os.environ["OURS"], os.environ.get("HOME"), sys.path[0], __name__)
print(os.getppid(), os.getsid(0) == os.getpid(), sys.stdout.line_buffering, sys.stderr.errors, file=sys.stderr)
"""


@pytest.mark.parametrize("session", [False, True])
def test_it_has_its_own_words_streams_folder_environment_and_session(tmp_path: Path, session: bool) -> None:
    def said(popen: type) -> tuple[int, str, str]:
        env = {"OURS": "größe"}
        return run(tmp_path, SAYS, "a b", popen=popen, cwd=tmp_path, env=env, start_new_session=session)

    assert said(warm.Popen) == said(subprocess.Popen)
    assert str(os.getpid()) in said(warm.Popen)[2]


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(7)",
        "raise SystemExit('why')",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
        "import threading, time; threading.Timer(0.05, print, ['a thread']).start()",
        "import os; os.kill(os.getpid(), 9)",
        "import signal, time; signal.raise_signal(signal.SIGTERM)",
        "import os, signal\ntry:\n    signal.raise_signal(2)\nexcept KeyboardInterrupt:\n    print('interrupted')",
    ],
)
def test_it_ends_as_others_end(tmp_path: Path, code: str) -> None:
    assert run(tmp_path, code) == run(tmp_path, code, popen=subprocess.Popen)


def test_an_error_is_told_on_its_standard_error(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, "1 / 0")
    assert (status, out) == (1, "")
    assert err.endswith("ZeroDivisionError: division by zero\n")


def test_it_is_there_until_it_is_waited_for() -> None:
    with warm.Popen([sys.executable, "-m", "this_is_no_module"], stderr=subprocess.PIPE) as process:
        assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT).si_status == 1
        os.kill(process.pid, signal.SIGKILL)  # a zombie still has its number
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_one_that_cannot_begin_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="before it began"):
        run(tmp_path, "", cwd=tmp_path / "nowhere")
