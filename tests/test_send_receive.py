"""`tensorferry send` and `receive` as processes: what arrives, what is left when it does not, and who is told."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
from types import SimpleNamespace

import pytest
import torch
import warm
from carry_kit import PATIENCE, SLOW, listing, long_file, paste, paste_into_a_shell, receiving, sending, small_file
from command_kit import environment, on_a_terminal, tensorferry
from jsonschema import Draft202012Validator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tensorferry as tf
from tensorferry import cli, schemas
from tensorferry.commands import carrying, new_file, receive, serving
from tensorferry.commands.carrying import RECEIPTS, Note
from tensorferry.commands.table import Column, Table
from tensorferry.commands.token_file import open_file
from tensorferry.core.errors import InternalError
from tensorferry.core.settings import Settings

QUICK = ("--peer-timeout", "1.5", "--heartbeat", "0.3")


def checked(name: str, text: str) -> dict:
    """The object that a command printed, held against its schema."""
    schema = schemas.load(name)
    found = json.loads(text)
    Draft202012Validator(schema).validate(found)
    assert set(found) - set(schema["properties"]) == set(), "a field that the schema does not describe"
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ---- what arrives


def test_the_printed_command_carries_the_file_to_the_last_byte(tmp_path):
    torch.manual_seed(7)
    n = 20_000  # the pool is 8,192 tokens
    tensors = {
        "input_embeds": torch.randn(n, 96).bfloat16(),
        "fill_ids": torch.arange(n, dtype=torch.int64),
        "visual.deepstack/0, 'quoted' $HOME": torch.randn(n, 2, 5),
        "aux": torch.randint(0, 2, (n,)).bool(),
        "größe": torch.randint(0, 255, (n, 3), dtype=torch.uint8),
        "eight": torch.randn(n, 4).to(torch.float8_e4m3fn),
    }
    file = tmp_path / "my clip.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    with sending(file, popen=subprocess.Popen) as sender:
        done = paste_into_a_shell(sender.command, tmp_path)
        assert done.returncode == 0, done.stderr
        status, said, errors = sender.end()
    assert (status, errors) == (0, "")
    assert "receiver 1 of 1: written and verified" in said
    written = tmp_path / "my clip.received.safetensors"
    arrived = load_file(written)
    assert {name: (t.dtype, t.shape) for name, t in arrived.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert all(torch.equal(arrived[name].view(torch.uint8), t.view(torch.uint8)) for name, t in tensors.items())
    with safe_open(written, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert written.read_bytes() == file.read_bytes()
    assert "20000 of 20000 tokens" in done.stdout
    assert "verified: xxh3_128:" in done.stdout
    assert "\x1b[" not in done.stdout + said


def test_as_json_both_sides_print_one_object(tmp_path):
    file = small_file(tmp_path / "clip.safetensors", 3000)
    with sending(
        file, "--format", "json", "--first-grant", "1024", "--window", "rounds", "--block-size", "64"
    ) as sender:
        done = paste(f"{sender.command} --format json", tmp_path)
        status, said, _ = sender.end()
    received, sent = checked("receive", done.stdout), checked("send", said)
    assert (done.returncode, status, received["status"], sent["status"]) == (0, 0, "ok", "ok")
    assert sent["command"] == sender.command
    assert sent["digest"] == received["digest"]
    assert (received["verified"], received["receipt"]) == (True, True)
    assert received["total_tokens"] == sent["total_tokens"] == 3000
    assert received["bytes"] == sent["bytes"] == 3000 * 16
    assert (sent["served"], len(sent["deliveries"]), sent["failed_deliveries"]) == (1, 1, [])
    assert received["transport"] == sent["transport"]
    # The settings travel in the command: the receiver's rounds are those that the sender's flags ask for.
    assert [entry["tokens"] for entry in received["rounds"]] == [1024, 1976]
    assert received["sent_tokens"] == [1024, 3000]
    for name, good, spoilt in (
        ("receive", received, {"status": "failed"}),
        ("receive", received, {"digest": None}),
        ("receive", received, {"error": {"code": "x", "cause": "x", "hint": ""}}),
        ("send", sent, {"command": None}),
        ("send", sent, {"status": "fine"}),
        ("send", sent, {"served": -1}),
        ("send", sent, {"digest": "md5:0"}),
    ):
        assert not Draft202012Validator(schemas.load(name)).is_valid(good | spoilt), spoilt


def test_several_receivers_one_after_the_other(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    result = tmp_path / "clip.received.safetensors"
    with sending(file, "--count", "2") as sender:
        assert paste(sender.command, tmp_path).returncode == 0
        first = result.stat().st_ino
        again = paste(sender.command, tmp_path)
        assert again.returncode == 1
        assert "clip.received.safetensors exists (output_exists)" in again.stderr
        assert "--force" in again.stderr
        assert result.stat().st_ino == first
        assert paste(f"{sender.command} --force", tmp_path).returncode == 0
        assert result.stat().st_ino != first
        status, said, _ = sender.end()
    assert status == 0
    assert "receiver 2 of 2" in said
    assert result.read_bytes() == file.read_bytes()
    assert listing(tmp_path) == ["clip.received.safetensors", "clip.safetensors"]


def test_a_receiver_needs_no_layout_that_an_earlier_file_has(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    example = small_file(tmp_path / "earlier.safetensors", tokens=5)
    with sending(file) as sender:
        ours = ["--room", "17", "--from", sender.address.removeprefix("tcp://"), "--layout-from", str(example)]
        done = tensorferry("receive", *ours, "-o", str(tmp_path / "out"), popen=warm.Popen)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == file.read_bytes()


def test_bound_to_every_interface_the_command_names_an_address_that_others_can_reach(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    with sending(file, "--bind", "0.0.0.0:0") as sender:
        assert "0.0.0.0" not in sender.command
        sender.until("waiting for a receiver")
        assert f"is open at {sender.address}, waiting" in sender.said[-1]
        assert paste(sender.command, tmp_path).returncode == 0
        assert sender.end()[0] == 0


def test_a_terminal_gets_a_bar_that_moves(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    with sending(file) as sender:
        args = shlex.split(sender.command)[1:]
        args[-1] = str(tmp_path / "out")
        status, said = on_a_terminal(*args)
    assert status == 0, said
    assert "━" in said
    assert "verified" in said


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("x", {"a=b": "c"}),
        ("x", {"=x": "y", "%3D": "%25"}),
        ("x", {"": "c"}),
        ("x", {"-o": "elsewhere", "--force": "-1", "k": ""}),
        ("-x", {}),
        ("--output=y", {"größe, 'so'": '"a b"'}),
        ("a\nb", {"k\n": "one\ntwo\r\n\x1b[31m\u2028\x85 100%0A größe"}),
    ],
)
def test_the_printed_command_holds_whatever_names_and_metadata_a_file_has(tmp_path, name, metadata):
    file = tmp_path / "clip.safetensors"
    save_file({name: torch.arange(12).view(3, 4)}, file, metadata=metadata)
    with sending(file) as sender:
        done = paste(sender.command, tmp_path)
        assert done.returncode == 0, done.stderr
        assert sender.end()[0] == 0
    assert listing(tmp_path) == ["clip.received.safetensors", "clip.safetensors"]
    with safe_open(tmp_path / "clip.received.safetensors", framework="pt") as opened:
        assert (opened.metadata() or {}, list(opened.keys())) == (metadata, [name])


def test_a_file_whose_name_has_a_line_end_is_received_under_a_name_without(tmp_path):
    file = small_file(tmp_path / "clip\n2.safetensors")
    with sending(file) as sender:
        assert sender.command.endswith("-o clip%0A2.received.safetensors")


def fitted(tokens: int, token_bytes: int, **given: object) -> tuple[int, int, int]:
    loaded = Settings.load(command_line=given, environ={}, file="/dev/null")
    settings = carrying.fitted(loaded, tokens, token_bytes)
    return settings.block_size, settings.pool_blocks, settings.first_grant


def test_the_pool_is_as_large_as_the_file_and_no_larger_than_its_bytes_may_be():
    assert fitted(50_000, 7168) == (128, 64, 8192)  # as the settings are
    assert fitted(300, 16) == (128, 3, 384)
    assert fitted(3, 100_000) == (128, 1, 128)  # 12.8 MB in place of 819 MB
    assert fitted(3, 20_000_000) == (1, 3, 3)  # 60 MB in place of 164 GB
    assert fitted(5000, 20_000_000) == (1, 13, 13)
    assert fitted(5000, 1_500_000_000) == (1, 1, 1)
    assert fitted(50_000, 65_536) == (128, 32, 4096)
    for tokens, token_bytes in ((7, 3), (1000, 300_000), (100_000, 1 << 20)):
        block_size, pool_blocks, _ = fitted(tokens, token_bytes)
        assert block_size * pool_blocks * token_bytes <= carrying.POOL_BYTES
    # What is given is meant.
    assert fitted(3, 20_000_000, block_size=128, pool_blocks=64, first_grant=8192) == (128, 64, 8192)
    assert fitted(3, 20_000_000, pool_blocks=64) == (1, 64, 64)


def test_a_receiver_of_wide_rows_takes_the_memory_of_the_file(tmp_path):
    file = tmp_path / "clip.safetensors"
    save_file({"x": torch.arange(3 * 400_000, dtype=torch.int32).view(3, 400_000)}, file)  # 13 GB in a default pool
    with sending(file) as sender:
        done = paste(sender.command, tmp_path)
        assert done.returncode == 0, done.stderr
        assert sender.end()[0] == 0
    words = shlex.split(sender.command)
    sizes = [words[words.index(flag) + 1] for flag in ("--block-size", "--pool-blocks")]
    assert sizes == ["20", "1"]
    assert (tmp_path / "clip.received.safetensors").read_bytes() == file.read_bytes()


# ---- what is left when it does not arrive


def test_a_receiver_that_is_killed_leaves_nothing_and_can_be_run_again(tmp_path):
    file = long_file(tmp_path / "clip.safetensors")
    with sending(file, "--block-size", "8") as sender:
        with receiving(f"{sender.command} {SLOW}", tmp_path, "of 200000 tokens") as receiver:
            receiver.kill()
            receiver.wait(PATIENCE)
        assert listing(tmp_path) == ["clip.safetensors"]
        done = paste(f"{sender.command} --pool-blocks 4096", tmp_path)
        assert done.returncode == 0, done.stderr
        status, said, _ = sender.end()
    assert status == 0
    assert "receiver 1 of 1" in said
    assert (tmp_path / "clip.received.safetensors").read_bytes() == file.read_bytes()


def test_an_interrupted_receive_leaves_nothing_and_the_sender_goes_on(tmp_path):
    file = long_file(tmp_path / "clip.safetensors")
    with sending(file, "--count", "0", "--block-size", "8") as sender:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            popen = subprocess.Popen if number == signal.SIGINT else warm.Popen
            with receiving(f"{sender.command} {SLOW}", tmp_path, "of 200000 tokens", popen) as receiver:
                receiver.send_signal(number)
                _, errors = receiver.communicate(timeout=PATIENCE)
            assert receiver.returncode == 1
            assert errors.startswith("error: interrupted (cancelled)")
            assert "Traceback" not in errors
            assert listing(tmp_path) == ["clip.safetensors"]
            sender.until("not delivered: ")
        done = paste(f"{sender.command} --pool-blocks 4096", tmp_path)
        assert done.returncode == 0, done.stderr
        sender.until("receiver 1: written and verified")
        sender.process.send_signal(signal.SIGINT)
        status, said, errors = sender.end()
    assert (status, errors) == (0, "")  # any number will do, so this is how it ends
    assert "served 1 receiver" in said


def test_a_second_receiver_is_refused_and_an_interrupted_sender_tells_the_first(tmp_path):
    file = long_file(tmp_path / "clip.safetensors")
    with (
        sending(file, "--block-size", "8") as sender,
        receiving(f"{sender.command} {SLOW}", tmp_path, "of 200000 tokens") as receiver,
    ):
        second = paste(f"{sender.command} --format json", tmp_path)
        refused = checked("receive", second.stdout)["error"]
        assert (refused["code"], refused["cause"]) == ("room_in_use", "another receiver has room 17 open")
        assert "run this again when that one is done" in refused["hint"]
        sender.process.send_signal(signal.SIGINT)
        status, _, errors = sender.end()
        assert (status, errors.splitlines()[0]) == (1, "error: interrupted (cancelled)")
        _, errors = receiver.communicate(timeout=PATIENCE)
        assert (receiver.returncode, "(cancelled)" in errors) == (1, True)
    assert listing(tmp_path) == ["clip.safetensors"]


def test_a_disk_that_fills_leaves_nothing(tmp_path):
    file = long_file(tmp_path / "clip.safetensors")
    with sending(file, "--count", "1") as sender:
        done = paste_into_a_shell(f"ulimit -f 100; {sender.command} --format json", tmp_path)
        assert checked("receive", done.stdout)["error"]["code"] == "cannot_write"
        assert done.returncode == 1
        assert listing(tmp_path) == ["clip.safetensors"]
        # The rows had arrived, and the file was not written: that is not served.
        assert paste(sender.command, tmp_path).returncode == 0
        assert sender.end()[0] == 0


def test_a_sender_that_is_restarted_at_its_address_goes_on_where_it_was(tmp_path):
    file = long_file(tmp_path / "clip.safetensors")
    flags = ("--bind", f"127.0.0.1:{free_port()}", "--block-size", "8")
    with (
        sending(file, *flags) as sender,
        receiving(sender.command, tmp_path, "of 200000 tokens") as receiver,
    ):
        sender.process.kill()
        sender.process.wait(PATIENCE)
        with sending(file, *flags) as successor:
            out, errors = receiver.communicate(timeout=PATIENCE)
            assert receiver.returncode == 0, out + errors
            assert successor.end()[0] == 0
    assert (tmp_path / "clip.received.safetensors").read_bytes() == file.read_bytes()


def test_a_defect_of_one_receiver_ends_its_own_delivery_and_the_sender_goes_on(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")

    def broken(*_):
        raise ZeroDivisionError("a defect")

    with sending(file, "--count", "0") as sender:
        with tf.Receiver(tf.Layout([tf.Component("x", "float32", (4,))])) as theirs:
            theirs._gatherer._begin = broken
            with pytest.raises(InternalError, match="a defect"):
                theirs.receive(17, sender.address).result(timeout=PATIENCE)
            sender.until("(internal); the room stays open")
        assert paste(sender.command, tmp_path).returncode == 0
        sender.until("receiver 1: written and verified")
        sender.process.send_signal(signal.SIGINT)
        assert sender.end()[0] == 0


def test_a_receiver_of_two_ranks_whose_second_never_comes_delays_the_others_and_no_more(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    with sending(file, "--announce-deadline", "2") as sender:
        layout, group = tf.Layout([tf.Component("x", "float32", (4,))]), tf.Group(0, 2, leader="tcp://127.0.0.1:0")
        with tf.Receiver(layout, group=group) as theirs:
            opened = theirs.receive(17, sender.address)
            sender.until("a receiver has opened room 17")
            opened.cancel()
            sender.until("room 17 is in use until every rank of its last receiver is heard of")
        sender.until("room 17 is open at")  # after announce_deadline
        assert paste(sender.command, tmp_path).returncode == 0
        assert sender.end()[0] == 0


def test_offers_that_fail_at_once_are_no_hot_loop(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "PAUSE_SECONDS", 1e9)
    offers, said = [], []

    def offer(*_, **__):
        offers.append(InternalError("a defect"))
        return SimpleNamespace(done=True, error=offers[-1], status="FAILED", transport="", sent_tokens=0)

    sender, view = SimpleNamespace(send=offer, announce=offer), SimpleNamespace(line=said.append)
    file = open_file(str(small_file(tmp_path / "clip.safetensors")))
    one = serving.Serving(file, 17, 1, receipts=False)
    for _ in range(3):
        one._keep_on_offer(sender)
        one._look(view)
    assert (len(offers), list(one.failures)) == (1, offers)
    assert said == ["not delivered: a defect (internal); the room stays open"]
    one._pause_ends = 0.0
    one._keep_on_offer(sender)
    assert len(offers) == 2


# ---- sides that do not fit


def test_what_does_not_fit_is_told_and_the_sender_goes_on_serving(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    with sending(file) as sender:

        def attempt(**changes: str) -> str:
            words = shlex.split(sender.command)
            for flag, value in changes.items():
                name = f"--{flag.replace('_', '-')}"
                words = [*words, name, value]
            done = paste(shlex.join([*words, "--format", "json"]), tmp_path)
            assert done.returncode == 1, done.stdout + done.stderr
            return checked("receive", done.stdout)["error"]["code"]

        assert attempt(layout="x:float32:5") == "layout_mismatch"
        assert attempt(block_size="64") == "geometry_mismatch"
        assert attempt(room="18", announce_deadline="1") == "deadline"
        assert listing(tmp_path) == ["clip.safetensors"]
        assert paste(sender.command, tmp_path).returncode == 0
        assert sender.end()[0] == 0


def test_where_nobody_is_the_receiver_says_so(tmp_path):
    args = ["--room", "1", "--from", f"127.0.0.1:{free_port()}", "--layout", "x:float32", "-o", str(tmp_path / "out")]
    done = tensorferry("receive", *args, *QUICK, "--format", "json", popen=warm.Popen)
    assert done.returncode == 1
    assert checked("receive", done.stdout)["error"]["code"] == "peer_unreachable"
    assert listing(tmp_path) == []


def test_where_nobody_comes_the_sender_ends_at_its_timeout(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    with sending(file, "--format", "json", "--timeout", "0.5") as sender:
        status, said, _ = sender.end()
    found = checked("send", said)
    assert (status, found["error"]["code"], found["served"]) == (1, "deadline", 0)


def test_a_file_that_changes_is_not_offered_again(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    with sending(file, "--count", "0") as sender:
        small_file(tmp_path / "new.safetensors", 200).rename(file)
        assert paste(sender.command, tmp_path).returncode == 0  # what was mapped is still there, and is whole
        status, said, errors = sender.end()
    assert status == 1
    assert "has changed since it was opened (bad_file)" in errors
    assert "receiver 1" in said


# ---- senders that are programs


@pytest.fixture
def program(tmp_path):
    """A sender that is no `tensorferry send`: (the sender, how to receive room 5 from it)."""
    layout = tf.Layout([tf.Component("x", "float32", (4,))])
    with tf.Sender(layout, transport="shm") as sender:
        args = ["receive", "--room", "5", "--from", sender.address, "--layout", "x:float32:4", "--transport", "shm"]
        yield sender, [*args, "-o", str(tmp_path / "out"), "--format", "json"]


@pytest.mark.parametrize(
    ("where", "what", "force", "written"),
    [
        (receive, "_give_receipt", False, True),
        (new_file, "_sync_folder", False, True),
        (new_file, "_sync_folder", True, True),
        (os, "link", False, True),  # and it returns no more: nothing of ours can note that it has been done
        (os, "replace", True, True),
        (os, "link", True, False),  # to the name that it has before it replaces the other file
        (os, "fsync", False, False),
    ],
)
def test_an_interrupt_denies_no_file_that_is_there(monkeypatch, program, tmp_path, capsys, where, what, force, written):
    real = getattr(where, what)

    def interrupted(*args, **more):
        if what in ("link", "replace"):
            real(*args, **more)
        raise KeyboardInterrupt

    sender, args = program
    if force:
        args.append("--force")
        (tmp_path / "out").write_text("before")
    rows = torch.ones(10, 4)
    table = Table([Column("x", "float32", (4,))])
    digest = table.digest(10, {"x": memoryview(rows.numpy().tobytes())})
    sender.send(5, x=rows, aux=Note(digest, RECEIPTS | 5).words())
    with monkeypatch.context() as now:
        now.setattr(where, what, interrupted)
        status = cli.main(args)
    found = checked("receive", capsys.readouterr().out)
    assert (status, found["status"]) == ((0, "ok") if written else (1, "failed"))
    assert (found["verified"], found["receipt"]) == (True, False)
    assert listing(tmp_path) == (["out"] if written or force else [])
    if written:
        assert torch.equal(load_file(tmp_path / "out")["x"], rows)
    elif force:
        assert (tmp_path / "out").read_text() == "before"


def test_rows_with_another_digest_are_not_written(program, tmp_path):
    sender, args = program
    sender.send(5, x=torch.ones(10, 4), aux=Note(b"not the digest !", 0).words())
    done = tensorferry(*args, popen=warm.Popen)
    found = checked("receive", done.stdout)
    assert (done.returncode, found["error"]["code"], found["verified"]) == (1, "integrity", False)
    assert listing(tmp_path) == []


def test_a_program_may_send_to_receive_without_a_digest(program, tmp_path):
    sender, args = program
    sender.send(5, x=torch.ones(10, 4))
    done = tensorferry(*args, popen=warm.Popen)
    found = checked("receive", done.stdout)
    assert (done.returncode, found["status"], found["verified"]) == (0, "ok", False)
    assert torch.equal(load_file(tmp_path / "out")["x"], torch.ones(10, 4))


def test_a_program_may_receive_from_send(tmp_path):
    file = small_file(tmp_path / "clip.safetensors")
    with sending(file, "--no-receipt") as sender, tf.Receiver(tf.Layout([tf.Component("x", "float32", (4,))])) as mine:
        result = mine.receive(17, sender.address).result(timeout=PATIENCE)
        assert torch.equal(result.x, load_file(file)["x"])
        assert sender.end()[0] == 0


# ---- usage


def test_without_a_layout_receive_teaches(tmp_path):
    done = tensorferry("receive", "--room", "1", "--from", "127.0.0.1:1", "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "--layout is missing" in done.stderr
    assert "`tensorferry send` prints" in done.stderr
    args = ["--layout", "x:float32", "--layout-from", "x", "-o", str(tmp_path / "out")]
    done = tensorferry("receive", "--room", "1", "--from", "127.0.0.1:1", *args, "--format", "json")
    assert (done.returncode, checked("receive", done.stdout)["error"]["code"]) == (2, "bad_flag")


@pytest.mark.parametrize(
    "args",
    [
        ["send", "x.safetensors"],
        ["send", "--room", "1"],
        ["send", "x.safetensors", "--room", "-1"],
        ["send", "x.safetensors", "--room", str(1 << 62)],
        ["send", "x.safetensors", "--room", "1", "--count", "-1"],
        ["send", "x.safetensors", "--room", "1", "--timeout", "soon"],
        ["send", "x.safetensors", "--room", "1", "--option", "bind"],
        ["receive", "--room", "1", "--from", "127.0.0.1:1", "--layout", "x:float32"],
        ["receive", "--room", "1", "--layout", "x:float32", "-o", "out"],
        ["receive", "--room", "1", "--from", "127.0.0.1:1", "--layout", "x", "-o", "out"],
        ["receive", "--room", "1", "--from", "127.0.0.1:1", "--layout", "x:int8", "-o", "out", "--metadata", "x"],
    ],
)
def test_wrong_usage_is_status_2_with_a_hint(args, capsys):
    try:
        status = cli.main(args)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert "hint:  " in said.err


@pytest.mark.parametrize("command", ["send", "receive"])
def test_help_teaches(command):
    done = tensorferry(command, "--help", env=environment(COLUMNS="120"))
    assert done.returncode == 0
    assert f"  tensorferry {command} " in done.stdout


def test_the_schemas_are_schemas():
    for name in ("send", "receive"):
        Draft202012Validator.check_schema(schemas.load(name))
