"""Processes that have torch imported when they begin: forked from one that has, in place of an interpreter for each.

Importing torch takes a second or two of a processor, and the tests start hundreds of processes. `Popen` is
subprocess.Popen for a Python program. What it starts is a child of this process and a process like any other: it has
its own standard streams, working directory, environment and session, and is signalled, killed and waited for. What is
different: its modules are there already, they are not taken apart at its end, and /proc has another command line.

A process that waits here (the stove) forks twice; the one between ends at once, and the kernel gives its child to this
process, which is a subreaper for that moment. Run as a program, this file is the stove.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MODULES = (
    "numpy",
    "pytest",
    "rich.live",
    "rich.progress",
    "safetensors.torch",
    "stevedore.driver",
    "stevedore.enabled",
    "stevedore.named",
    "tensorferry.api",
    "tensorferry.backends.memory",
    "tensorferry.backends.mooncake",
    "tensorferry.backends.nixl",
    "tensorferry.backends.shm",
    "tensorferry.backends.tcp",
    "tensorferry.cli",
    "tensorferry.commands.carry_view",
    "tensorferry.commands.carrying",
    "tensorferry.commands.demo_source",
    "tensorferry.commands.demo_wire",
    "torch",
)
"""None of these starts a thread or opens an engine: what forks has one thread."""

MESSAGE = 1 << 17
"""Bytes of the longest order: arguments and an environment."""

PR_SET_CHILD_SUBREAPER = 36


def _subreaper(on: bool) -> None:
    assert ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) == 0


class _Stove:
    """A process that forks, as seen by the one whose children they become."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    @classmethod
    @cache
    def lit(cls, modules: tuple[str, ...]) -> _Stove:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": "", "OPENBLAS_NUM_THREADS": "1"},  # else OpenBLAS starts a thread
            )

        def out() -> None:
            ours.close()
            process.wait()

        atexit.register(out)
        return cls(ours)

    def start(self, order: dict[str, Any], streams: list[int]) -> int:
        """Start a child of this process; returns its process id."""
        told, tell = os.pipe()
        with self._lock, open(told, "rb") as answer:
            _subreaper(True)
            try:
                socket.send_fds(self._channel, [json.dumps(order).encode()], [*streams, tell])
                os.close(tell)
                assert self._channel.recv(MESSAGE) == b"forked", "what forks has ended"
            finally:
                _subreaper(False)
            begun = answer.read()
        assert begun, "the process ended before it began: see standard error"
        return int(begun)


_lighting = threading.Lock()


class Popen(subprocess.Popen):
    """`[sys.executable, *flags, FILE or "-m" MODULE, *arguments]`. Of the flags, -P and -u are heeded."""

    modules: tuple[str, ...] = MODULES
    """What is imported."""

    within: tuple[str, ...] = ()
    """Modules whose own `subprocess.Popen` starts warm processes, too."""

    own: _Stove | None = None
    """In a process that was given one: what it starts has the modules that it has."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more) -> None:
        _, _, shell, in_, ours_in, ours_out, out, ours_err, err, *_, session, _ = more
        assert args[0] == sys.executable
        assert (executable, preexec_fn, close_fds, shell) == (None, None, True, False)
        assert not pass_fds
        with _lighting:
            stove = Popen.own or _Stove.lit(self.modules)
        order = {
            "words": [str(word) for word in args[1:]],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "session": session,
            "within": self.within,
        }
        try:
            streams = [given if given != -1 else usual for usual, given in enumerate((in_, out, err))]
            self.pid = stove.start(order, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(in_, ours_in, ours_out, out, ours_err, err)


def instead(popen: type[Popen]) -> SimpleNamespace:
    """The module subprocess with this Popen, for a module that is to start its processes so."""
    return SimpleNamespace(**{**vars(subprocess), "Popen": popen})


# ---- the stove, and what it starts ---------------------------------------------------------------------------


def _next_order(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each order; returns in the children alone. Ends when nobody is left to give orders."""
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    while True:
        order, fds, _, _ = socket.recv_fds(channel, MESSAGE, 4)
        if not order:
            os._exit(0)
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            channel.close()
            return json.loads(order), fds
        for fd in fds:
            os.close(fd)
        os.waitpid(between, 0)
        channel.send(b"forked")


def _begin(order: dict[str, Any], fds: list[int]) -> list[str]:
    """Become what was ordered; returns its words without the flags."""
    *streams, tell = fds
    for usual, fd in enumerate(streams):
        os.dup2(fd, usual)
        os.close(fd)
    if order["session"]:
        os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = order["words"]
    flags = [words.pop(0) for _ in words[:2] if words[0] in ("-P", "-u")]
    for usual, name in enumerate(("stdin", "stdout", "stderr")):
        how: dict[str, Any] = {"mode": "r"} if usual == 0 else {"mode": "w", "buffering": -1}
        if name == "stderr":
            how["errors"] = "backslashreplace"
        stream = open(usual, closefd=False, **how)  # noqa: SIM115  the process's own
        if name == "stderr" or "-u" in flags:
            stream.reconfigure(line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    first = order["cwd"] if words[0] == "-m" else str(Path(words[0]).parent)
    sys.path[:0] = [*([] if "-P" in flags else [first]), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    for module in order["within"]:
        importlib.import_module(module).subprocess = instead(Popen)
    if order["within"]:
        _light_another(tell)
    os.write(tell, str(os.getpid()).encode())
    os.close(tell)
    return words


def _light_another(tell: int) -> None:
    """A stove of this process's own, of which it can have children."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        Popen.own = _Stove(ours)
        return
    ours.close()
    os.close(tell)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull, "r+b", 0) as nothing:
        for usual in range(3):
            os.dup2(nothing.fileno(), usual)
    _burn(theirs)


def _burn(channel: socket.socket) -> None:
    """Be the stove; in what it forks, run the program and end."""
    words = _begin(*_next_order(channel))
    status: Any = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
    if not isinstance(status, int):
        print(status, file=sys.stderr)
    # As an interpreter ends, but that modules are not taken apart, which costs as much as all the rest.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF if isinstance(status, int) else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is for whoever gives orders
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, what the processes share
    _burn(socket.socket(fileno=int(sys.argv[1])))
