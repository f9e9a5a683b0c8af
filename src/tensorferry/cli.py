"""The `tensorferry` command: finds the sub-command, runs it, and turns errors into cause, hint and exit status.

Commands live in tensorferry.commands, one module each, with `add(commands, common)` and `run(args, output)`. None of
them imports torch, rich or an engine before it has to, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn, TextIO, cast

from tensorferry._version import __version__
from tensorferry.commands import config, conformance, demo, doctor, receive, send, transports
from tensorferry.commands.flags import common
from tensorferry.commands.output import Exit, MissingDependency, Output, exit_for, print_error
from tensorferry.core.errors import Cancelled, ConfigError, FerryError, InternalError

COMMANDS = (demo, send, receive, transports, doctor, conformance, config)

_EPILOG = """\
examples:
  tensorferry demo                          move a real embedding that is larger than the pool
  tensorferry demo --synthetic --rooms 4    four at once, of random numbers
  tensorferry send clip.safetensors --room 17   to another shell or host; prints the command to paste there
  tensorferry transports --why              what can move bytes here, and why not the others
  tensorferry conformance run shm           hold a transport to the numbered rules
  tensorferry doctor                        what is wrong here, why not RDMA, and who can connect
  tensorferry config show --origin          every setting, and where its value comes from

exit status: 0 done, 1 failed, 2 wrong usage, 3 cannot run here
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong and how to get help, without repeating all of the usage. Flags are written out in full, so
    that a flag which comes later cannot change what a script means."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"error: {message}\nhint:  `{self.prog} --help` shows the flags and examples\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    root = _Parser(
        prog="tensorferry",
        description="Moves variable-length embeddings between processes through a fixed pool of blocks, "
        "in as many rounds as it takes.",
        epilog=_EPILOG,
    )
    root.add_argument("--version", action="version", version=f"tensorferry {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shared = common()
    for command in COMMANDS:
        command.add(commands, shared)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Prints errors itself: nothing escapes but SystemExit from argparse."""
    _have_streams()
    stream, watched = sys.stdout, _Watched(sys.stdout)
    sys.stdout = cast("TextIO", watched)
    try:
        return _main(argv, watched)
    except SystemExit:
        if watched.failure is None:  # argparse passes over what its own words meet
            raise
    except OSError:
        if watched.failure is None:
            raise
    finally:
        sys.stdout = stream
        if watched.failure is not None:
            _mute(stream)
    if not isinstance(watched.failure, BrokenPipeError):  # else whoever read our output has closed it (`| head`)
        cause = f"standard output cannot be written to: {watched.failure.strerror}"
        try:
            print_error(ConfigError(cause, hint="Is the disk full that it goes to?"), sys.stderr)
        except OSError:
            _mute(sys.stderr)
    return int(Exit.FAILED)


def _main(argv: Sequence[str] | None, stdout: _Watched) -> int:
    """Raises what writing to standard output raises, besides SystemExit."""
    try:
        args = parser().parse_args(argv)
    except SystemExit:
        with suppress(OSError):
            stdout.flush()
        raise
    out = Output(json=args.format == "json")
    if args.debug:
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        return int(args.run(args, out))
    except FerryError as error:
        return _failed(out, error, args.debug, stdout)
    except KeyboardInterrupt:
        return _failed(out, Cancelled("interrupted"), args.debug, stdout)
    except ImportError as error:
        hint = "`pip install --force-reinstall tensorferry` brings back what it needs; `--debug` shows who imports it"
        return _failed(out, MissingDependency(f"{type(error).__name__}: {error}", hint=hint), args.debug, stdout)
    except Exception as error:  # noqa: BLE001  a defect of ours: said in one line, with the way to see all of it
        if stdout.failure is not None:
            raise stdout.failure from None
        hint = "Please report this, with what `--debug` adds to this output"
        return _failed(out, InternalError(f"{type(error).__name__}: {error}", hint=hint), args.debug, stdout)


def _failed(out: Output, error: FerryError, debug: bool, stdout: _Watched) -> int:
    try:
        if debug:
            traceback.print_exc()
        out.error(error)
    except OSError:
        if stdout.failure is not None:
            raise
        _mute(sys.stderr)  # it cannot be said: the status has to do
    return int(exit_for(error))


# ---- standard streams ----------------------------------------------------------------------------------------------


class _Watched:
    """Standard output, which remembers what kept it from being written to: whoever prints may not say."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.failure = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _have_streams() -> None:
    """A caller may have closed any of the three (`>&-`). What is opened next would take its place, and be written into:
    let it be /dev/null. The exit status says the same without words."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _mute(stream: TextIO) -> None:
    """Let what could not be written go nowhere, so that the flush at exit is quiet."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
