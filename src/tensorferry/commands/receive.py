"""`tensorferry receive`: what `tensorferry send` sends, into a safetensors file."""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tensorferry.commands import carrying
from tensorferry.commands.carry_view import View, in_bytes, view_for
from tensorferry.commands.carrying import DEFAULTS, Note
from tensorferry.commands.flags import load_settings
from tensorferry.commands.interrupts import all_as_interrupt
from tensorferry.commands.new_file import NewFile
from tensorferry.commands.output import BadFlag, Exit, Output, exit_for
from tensorferry.commands.table import Table, parse, told
from tensorferry.core.errors import (
    Cancelled,
    DeadlineExceeded,
    FerryError,
    IntegrityError,
    LayoutMismatch,
    RoomInUse,
)

if TYPE_CHECKING:
    from tensorferry import Receiver, ReceiveTransfer, Result
    from tensorferry.core.settings import Settings

TICK_SECONDS = 0.05

RECEIPT_SECONDS = 10.0
"""Longest wait for the sender to take the receipt: it takes one round trip, unless another receiver gives its own."""

_DESCRIPTION = """\
Receive a room from `tensorferry send` and write its tensors to a safetensors file. The whole command is printed by
`tensorferry send`; paste it. The file appears under its name when every byte has arrived and the digest over all of it
is right, and not before: whatever ends this command earlier leaves nothing, and it can be run again.
"""

_EXAMPLES = """\
examples:
  tensorferry receive --room 17 --from tcp://10.0.0.5:5555 \\
      --layout input_embeds:bfloat16:3584,fill_ids:int32 -o clip.safetensors
  tensorferry receive --room 17 --from 10.0.0.5:5555 --layout-from earlier.safetensors -o clip.safetensors --force
  tensorferry receive --room 17 --from encoder-0 --directory etcd://10.0.0.9:2379 \\
      --layout input_embeds:bfloat16:3584,fill_ids:int32 -o clip.safetensors

Rows arrive in memory first: a file larger than --destination-budget needs more of it. With --format json there is one
object on standard output at the end (schemas/receive.json).
"""

_TEACH = (
    "Paste the command that `tensorferry send` prints, or give --layout NAME:DTYPE:DIMENSIONS,... "
    "(input_embeds:bfloat16:3584,fill_ids:int32), or --layout-from a safetensors file with the same tensors"
)


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "receive",
        parents=[common],
        help="receive what `send` sends, into a safetensors file",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        usage="%(prog)s --room N --from ADDR|NAME --layout LAYOUT -o FILE [flags]",
    )
    what = parser.add_argument_group("what is received, from whom")
    carrying.add_shared(parser, what)
    what.add_argument(
        "--from",
        dest="sender",
        required=True,
        metavar="ADDR|NAME",
        help="the address that `send` printed, or the name that it is published under in --directory",
    )
    what.add_argument(
        "--layout",
        metavar="LAYOUT",
        help="the tensors: NAME:DTYPE for one number a token, NAME:DTYPE:AxB for more; separated by commas",
    )
    what.add_argument("--layout-from", metavar="FILE", help="the same tensors as in this safetensors file")
    what.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write")
    what.add_argument("--force", action="store_true", help="replace FILE if it exists")
    what.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an entry of the file's metadata, percent-encoded; may be repeated",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> Exit:
    report: dict[str, Any] = {
        "status": "failed",
        "file": args.output,
        "room": args.room,
        "sender": args.sender if carrying.is_name(args.sender) else carrying.address(args.sender),
        "transport": None,
        "total_tokens": 0,
        "bytes": 0,
        "digest": None,
        "verified": False,
        "receipt": False,
        "seconds": 0.0,
        "goodput_bytes_per_s": 0.0,
        "rounds": [],
        "sent_tokens": [],
    }
    view = View()
    file: NewFile | None = None
    error: FerryError | None = None
    try:
        with all_as_interrupt():
            settings = load_settings(args, DEFAULTS).settings
            if carrying.is_name(args.sender):
                carrying.need_directory(settings, args.sender, "look")
            table = _table(args)
            metadata = carrying.metadata(args.metadata)
            options = carrying.pairs("--option", args.option)
            report["transport"] = settings.transport
            with NewFile(args.output, force=args.force) as file:
                view = view_for(out)
                _receive(args, settings, options, table, metadata, file, report, view)
    except FerryError as caught:
        error = caught
        if isinstance(error, LayoutMismatch):
            error.hint = "Paste the command that `tensorferry send` prints: its --layout describes the file"
        elif isinstance(error, RoomInUse):
            error.hint = "`tensorferry send` serves --count receivers in turn: run this again when that one is done"
    except KeyboardInterrupt:
        if file is not None and file.published:  # only what comes after it was cut short: the receipt, or a sync
            report["status"] = "ok"
        else:
            error = Cancelled("interrupted", hint=f"{args.output} was not written; the command can be run again")
    finally:
        view.close()
    if error is not None:
        report["error"] = error.as_dict()
    if out.json:
        out.object(report)
    elif error is not None:
        out.error(error)
    else:
        _summary(report, out)
    return exit_for(error) if error is not None else Exit.OK


def _table(args: argparse.Namespace) -> Table:
    if args.layout and args.layout_from:
        raise BadFlag("--layout and --layout-from say the same thing", hint="Give one of them")
    if args.layout:
        return parse(args.layout)
    if args.layout_from:
        from tensorferry.commands.token_file import table_of

        return table_of(args.layout_from)
    raise BadFlag("a receiver has to know the tensors that come: --layout is missing", hint=_TEACH)


def _receive(
    args: argparse.Namespace,
    settings: Settings,
    options: dict[str, str],
    table: Table,
    metadata: dict[str, str],
    file: NewFile,
    report: dict[str, Any],
    view: View,
) -> None:
    view.wait("starting")
    import tensorferry as tf

    with tf.Receiver(table.layout, options=options, **settings.as_dict()) as receiver:
        if carrying.is_name(report["sender"]):
            view.wait(f"looking for {report['sender']} in {settings.directory}")
            report["sender"] = receiver.find(report["sender"])
        started = time.monotonic()
        sender = report["sender"]
        view.wait(f"waiting for room {args.room} at {sender}")
        transfer = receiver.receive(args.room, sender)
        try:
            _watch(receiver, transfer, table, file, view)
            result = transfer.result()
        finally:
            spent = time.monotonic() - started
            _add_progress(report, transfer, table.layout.token_bytes, spent)
        tokens = report["total_tokens"]
        note = Note.of(result.aux)
        view.wait("verifying the digest")
        _verify(table, tokens, result, note, report)
        view.wait(f"writing {args.output}")
        _write(table, tokens, result, metadata, file)
        file.publish()
        report["status"] = "ok"
        if note is not None and note.receipt:
            report["receipt"] = _give_receipt(receiver, sender, note.receipt)


def _watch(receiver: Receiver, transfer: ReceiveTransfer, table: Table, file: NewFile, view: View) -> None:
    token_bytes = table.layout.token_bytes
    reserved = False
    while True:
        over = transfer.done  # asked first, so that the last state of all is shown
        total = transfer.total_tokens
        if total is not None:
            if not reserved:
                file.reserve(total * token_bytes)
                reserved = True
            view.progress(transfer.sent_tokens, total, token_bytes, len(transfer.rounds))
        if over:
            return
        receiver.poll()
        with suppress(FerryError):  # how it ended is asked by the caller
            transfer.wait(timeout=TICK_SECONDS)


def _add_progress(report: dict[str, Any], transfer: ReceiveTransfer, token_bytes: int, spent: float) -> None:
    nbytes = transfer.sent_tokens * token_bytes
    report["transport"] = transfer.transport or report["transport"]
    report["total_tokens"] = transfer.total_tokens or 0
    report["bytes"] = nbytes
    report["seconds"] = spent
    report["goodput_bytes_per_s"] = nbytes / spent if spent > 0 else 0.0
    report["rounds"] = [done._asdict() for done in transfer.rounds]
    report["sent_tokens"] = list(transfer.history)


def _views(table: Table, result: Result) -> dict[str, memoryview]:
    """The rows' bytes by the tensors' own names."""
    from tensorferry.commands.token_file import bytes_of

    rows = {}
    for column in table.columns:
        tensor = result[column.component.name]
        assert tensor is not None  # no component of such a layout is optional
        rows[column.name] = bytes_of(tensor.cpu())  # destination_device may be a GPU
    return rows


def _verify(table: Table, tokens: int, result: Result, note: Note | None, report: dict[str, Any]) -> None:
    digest = table.digest(tokens, _views(table, result))
    report["digest"] = told(digest)
    report["verified"] = note is not None and note.digest == digest
    if note is not None and note.digest != digest:
        raise IntegrityError(
            f"the rows have digest {told(digest)}, and the sender's file {told(note.digest)}",
            room=report["room"],
            hint="Has the sender's file changed while it was sent? Start `tensorferry send` again, and this command",
        )


def _write(table: Table, tokens: int, result: Result, metadata: dict[str, str], file: NewFile) -> None:
    from tensorferry.commands.token_file import header

    rows = _views(table, result)
    first, order = header(table, tokens, metadata)
    file.write(first)
    for name in order:
        file.write(rows[name])


def _give_receipt(receiver: Receiver, sender: str, room: int) -> bool:
    """Tell the sender that the file is written. The file is whole whether it hears or not."""
    last = time.monotonic() + RECEIPT_SECONDS
    while (left := last - time.monotonic()) > 0:
        try:
            receiver.receive(room, sender).result(timeout=left)
            return True
        except RoomInUse:
            time.sleep(TICK_SECONDS)
        except (DeadlineExceeded, FerryError):
            return False
    return False


def _summary(report: dict[str, Any], out: Output) -> None:
    rounds = len(report["rounds"])
    out.line(
        f"{report['total_tokens']} tokens in {rounds} {'round' if rounds == 1 else 'rounds'}, "
        f"{in_bytes(report['bytes'])} in {report['seconds']:.3f} s: {in_bytes(report['goodput_bytes_per_s'])}/s"
    )
    if report["verified"]:
        out.line(f"verified: {report['digest']}, as the sender's file")
    else:
        out.line("each block was verified; the sender gave no digest of the whole")
    out.line(f"wrote {report['file']}")
    if report["verified"] and not report["receipt"]:
        out.line("the sender was not told that the file is written")
