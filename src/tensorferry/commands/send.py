"""`tensorferry send`: the tensors of a safetensors file, to one receiver after the other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from tensorferry.commands import carrying
from tensorferry.commands.carry_view import View, in_bytes, view_for
from tensorferry.commands.carrying import DEFAULTS, MAX_METADATA, command_line
from tensorferry.commands.flags import load_settings
from tensorferry.commands.interrupts import all_as_interrupt
from tensorferry.commands.output import Exit, Output, exit_for
from tensorferry.commands.serving import Serving
from tensorferry.commands.table import told
from tensorferry.commands.token_file import TokenFile, open_file
from tensorferry.core.errors import Cancelled, FerryError
from tensorferry.core.setting_values import seconds
from tensorferry.core.settings import Settings

_DESCRIPTION = """\
Send the tensors of a safetensors file to `tensorferry receive`, in another shell or on another host. Every tensor needs
the same first dimension, one row a token. The command for the other side is printed; paste it there.

One receiver after the other is served until --count of them have the file on their disk. A receiver that was
interrupted, killed or refused does not count: the room stays open, and the same command can be run again. The file is
read where it lies and must not change meanwhile.
"""

_EXAMPLES = """\
examples:
  tensorferry send clip.safetensors --room 17                              to a receiver on this host
  tensorferry send clip.safetensors --room 17 --bind 0.0.0.0:5555          to other hosts: a network that you trust
  tensorferry send clip.safetensors --room 17 --count 3                    to three, one after the other
  tensorferry send clip.safetensors --room 17 --count 0                    to whoever comes, until Ctrl-C
  tensorferry send clip.safetensors --room 17 --bind 0.0.0.0:0 --publish encoder-0 --directory etcd://10.0.0.9:2379
                                                                           found by its name, wherever it listens
  tensorferry send clip.safetensors --room 17 --format json 2> log         for programs: schemas/send.json

With --format json the command for the other side is the line of standard error that begins with `tensorferry receive`;
it comes as soon as the room is open, and the one object on standard output at the end.

The control channel is not encrypted and asks nobody who they are. File metadata travels in the printed command, as
far as it is short; the rows' digest travels with them and is checked by the receiver before there is a file.
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "send",
        parents=[common],
        help="send a safetensors file to another shell or host",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        usage="%(prog)s FILE --room N [flags]",
    )
    what = parser.add_argument_group("what is sent, to whom")
    what.add_argument("file", metavar="FILE", help="a safetensors file")
    carrying.add_shared(parser, what)
    what.add_argument(
        "--bind",
        default="tcp://127.0.0.1:0",
        metavar="ADDR",
        help="where receivers find this side; port 0 takes a free one, 0.0.0.0 every interface (default %(default)s)",
    )
    what.add_argument(
        "--publish",
        metavar="NAME",
        default="",
        help="be found under this name in --directory, as long as this runs; the printed command names it",
    )
    what.add_argument(
        "--count",
        type=carrying.number(0, 2**31 - 1),
        default=1,
        metavar="N",
        help="receivers to serve, 0 for any number (default %(default)s)",
    )
    what.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="give up after this time (default never)")
    what.add_argument(
        "--no-receipt",
        action="store_true",
        help="count a receiver when the rows have arrived, not when its file is written: for receivers that are "
        "programs of yours and give no receipt",
    )
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    return seconds(text)


_seconds.__name__ = "time"


def run(args: argparse.Namespace, out: Output) -> Exit:
    view = View()
    serving: Serving | None = None
    error: FerryError | None = None
    try:
        with all_as_interrupt():
            loaded = load_settings(args, DEFAULTS)
            carrying.need_directory(loaded.settings, args.publish, "publish")
            options = carrying.pairs("--option", args.option)
            file = open_file(args.file)
            settings = carrying.fitted(loaded, file.tokens, file.table.layout.token_bytes)
            view = view_for(out)
            _describe(file, view)
            serving = Serving(file, args.room, args.count, receipts=not args.no_receipt, publish=args.publish)
            serving.run(
                settings,
                view,
                bind=carrying.address(args.bind),
                options=options,
                timeout=args.timeout,
                announce=_announcer(file, args, settings, out, view),
            )
    except FerryError as caught:
        error = caught
    except KeyboardInterrupt:
        if args.count or serving is None or not serving.address:
            error = Cancelled("interrupted", hint="Receivers that had not finished were told")
    finally:
        view.close()
    if out.json:
        out.object(_object(args, serving, error))
    else:
        if serving is not None and serving.address:
            out.line(f"served {serving.served} {'receiver' if serving.served == 1 else 'receivers'}")
        if error is not None:
            out.error(error)
    return exit_for(error) if error is not None else Exit.OK


def _describe(file: TokenFile, view: View) -> None:
    names = ", ".join(f"{column.name} {column.dtype}{list(column.shape)}" for column in file.table.columns)
    view.line(carrying.on_one_line(f"{file.path}: {file.tokens} tokens, {in_bytes(file.nbytes)}: {names}"))
    view.wait("reading the file for its digest")
    view.line(f"digest {told(file.digest)}")


def _announcer(
    file: TokenFile, args: argparse.Namespace, settings: Settings, out: Output, view: View
) -> Callable[[Serving], None]:
    """Says what to paste, once the address is known."""

    def announce(serving: Serving) -> None:
        name = PurePath(file.path)
        source = args.publish or serving.addresses[0]
        parts = ["tensorferry", "receive", "--room", str(args.room), "--from", source]
        parts += [f"--layout={file.table}"]
        metadata = [carrying.metadata_flag(key, value) for key, value in file.metadata.items()]
        left_out = sum(len(key) + len(value) + 1 for key, value in file.metadata.items()) > MAX_METADATA
        serving.metadata_carried = not left_out
        if left_out:
            warning = f"the file's metadata is longer than {MAX_METADATA} characters: it is not carried"
            print(f"# warning: {warning}", file=sys.stderr, flush=True)
        else:
            parts += metadata
        passed_on = settings if args.publish else replace(settings, directory="")
        parts += carrying.changed_settings(passed_on, {"destination_budget": file.nbytes})
        output = carrying.on_one_line(f"{name.stem}.received{name.suffix}")
        parts += ["-o", f"./{output}" if output.startswith("-") else output]
        serving.command = command_line(parts)
        if out.json:
            print(serving.command, file=sys.stderr, flush=True)
            return
        view.line("run this where the tokens are wanted:")
        view.line("")
        view.line(serving.command)
        view.line("")
        if args.publish:
            view.line(f"{args.publish} stands for {serving.addresses[0]}")
        if len(serving.addresses) > 1:
            view.line(f"this host can also be reached at {', '.join(serving.addresses[1:])}")
        elif serving.only_here:
            view.line("only this host can reach that address; --bind 0.0.0.0:0 is for others, in a network you trust")

    return announce


def _object(args: argparse.Namespace, serving: Serving | None, error: FerryError | None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "status": "failed" if error else "ok",
        "file": args.file,
        "room": args.room,
        "count": args.count,
        "address": None,
        "command": None,
        "transport": None,
        "total_tokens": 0,
        "bytes": 0,
        "digest": None,
        "served": 0,
        "metadata_carried": True,
        "deliveries": [],
        "failed_deliveries": [],
    }
    if serving is not None:
        made |= serving.as_dict()
    if error is not None:
        made["error"] = error.as_dict()
    return made
