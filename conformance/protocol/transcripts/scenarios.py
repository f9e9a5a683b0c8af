"""The scenarios. Each is a function that plays a tape; its name is the file's, its docstring the file's `about`."""

from __future__ import annotations

from collections.abc import Callable

from tensorferry.conformance.protocol.transcripts.recorder import Tape
from tensorferry.conformance.protocol.transcripts.values import SENDER
from tensorferry.core import messages as m

SCENARIOS: dict[str, Callable[[], Tape]] = {}


def scenario(play: Callable[[], Tape]) -> Callable[[], Tape]:
    SCENARIOS[play.__name__.replace("_", "-")] = play
    return play


def _whole(total: int, **sizes: object) -> Tape:
    tape = Tape(**sizes)  # type: ignore[arg-type]
    tape.start()
    tape.offer(17, total)
    tape.receive(17)
    tape.run()
    tape.assert_clean()
    return tape


def _in_the_middle(total: int = 1000, **sizes: object) -> Tape:
    """The first grant is being written."""
    tape = Tape(**sizes)  # type: ignore[arg-type]
    tape.start()
    tape.hold_writes = True
    tape.offer(17, total)
    tape.receive(17)
    tape.run()
    return tape


@scenario
def first_grant_enough() -> Tape:
    """The optimistic first grant holds all 500 tokens: one round."""
    return _whole(500)


@scenario
def announced_first_grant() -> Tape:
    """No block is lent: the first grant follows the announcement and has its size."""
    return _whole(500, optimistic=False)


@scenario
def rounds_12000() -> Tape:
    """12,000 tokens through a first grant of 8192: a second round carries the rest."""
    return _whole(12_000, pool=128, slabs=2, first_grant=64)


@scenario
def rounds_50000() -> Tape:
    """50,000 tokens in rounds of 8192, 16,384 and 25,424: each grant asks for twice the one before."""
    return _whole(50_000, pool=256, slabs=2, first_grant=64)


@scenario
def window() -> Tape:
    """1000 tokens through a window of two blocks: the next grant does not wait for the whole of the one before."""
    return _whole(1000, pool=3, window=2, optimistic=False)


@scenario
def loan_returned() -> Tape:
    """Eight blocks were lent before the length was known; what the announced length does not need is free at once."""
    tape = Tape(pool=8, first_grant=8)
    tape.start()
    tape.receive(17)
    tape.run()
    tape.offer(17, 300)
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def no_tokens() -> Tape:
    """T = 0: delivered at the announcement, nothing is granted."""
    return _whole(0, optimistic=False)


@scenario
def one_token() -> Tape:
    """T = 1: one block, of which one token is written."""
    return _whole(1)


@scenario
def rows_little_by_little() -> Tape:
    """Rows become readable while they are sent: what is granted beyond them waits at the sender."""
    tape = Tape(pool=8, first_grant=4)
    tape.start()
    tape.offer(17, 400, ready=130)
    tape.receive(17)
    tape.run()
    tape.event("sender", "extend", offer=1, ready=400)
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def cancelled_by_the_receiver() -> Tape:
    """A write is out: its blocks wait in quarantine until the sender says that nothing can land any more."""
    tape = _in_the_middle()
    tape.event("receiver", "cancel", xfer=1, code="cancelled", cause="not wanted any more")
    tape.run()
    tape.hold_writes = False
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def cancelled_by_the_sender() -> Tape:
    """The room is aborted; the receiver closes, and takes its blocks back when the write has drained."""
    tape = _in_the_middle()
    tape.event("sender", "cancel", offer=1, code="cancelled", cause="not sent any more")
    tape.run()
    tape.hold_writes = False
    tape.run()
    tape.assert_clean()
    return tape


def _restarted(content: int) -> Tape:
    """The first half is here and the next grant is being written when the sender dies."""
    tape = Tape(pool=8, slabs=2, first_grant=4)
    tape.start()
    tape.offer(17, 1000)
    tape.receive(17)
    while len([s for s in tape.steps if s.get("in", {}).get("event") == "gathered"]) < 1:
        tape.step()
    tape.hold_writes = True
    tape.run()
    tape.restart("sender")
    tape.offer(17, 1000, content=content)
    tape.event("receiver", "heartbeat", "the receiver speaks to the dead one, and is answered by its successor",
               peer=SENDER)  # fmt: skip
    tape.run()
    tape.resend()
    tape.hold_writes = False
    tape.run()
    tape.event("receiver", "peer_gone", "a proof (the process has ended): its blocks are free", incarnation=1000)
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def sender_restarts_with_the_same_content() -> Tape:
    """Equal content_id: the new incarnation resumes behind what was gathered."""
    return _restarted(1)


@scenario
def sender_restarts_with_other_content() -> Tape:
    """Another content_id: what was gathered does not count, the transfer starts over."""
    return _restarted(2)


@scenario
def failed_write() -> Tape:
    """A write fails: Trouble, a new epoch, Revoke and Fenced, and what is missing is granted again."""
    tape = _in_the_middle()
    post = tape.posts.popleft()
    indices = [[first, count] for first, _, count, _ in post.runs]
    tape.event("sender", "write_failed", write=list(post.write), indices=indices, code="transport", cause="refused")
    tape.hold_writes = False
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def unknown_write() -> Tape:
    """A write's outcome is unknown: no Fenced before it is drained, and other blocks carry meanwhile."""
    tape = _in_the_middle(pool=8, first_grant=4)
    post = tape.posts.popleft()
    tape.event("sender", "write_unknown", write=list(post.write), code="unknown_in_flight", cause="timed out")
    tape.hold_writes = False
    tape.run()
    indices = [[first, count] for first, _, count, _ in post.runs]
    tape.event("sender", "write_drained", write=list(post.write), indices=indices)
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def wrong_digest() -> Tape:
    """One block arrives damaged: never delivered, a new epoch."""
    tape = _in_the_middle()
    tape.hold_writes, tape.hold_gathers = False, True
    tape.run()
    tape.blocks[10, 0] = (0, 9)  # what stands there is not what was written
    tape.hold_gathers = False
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def revoked_on_suspicion() -> Tape:
    """The receiver suspects the path: everything out is revoked, and freed by Fenced when the writes have drained."""
    tape = _in_the_middle()
    tape.event("receiver", "suspect", xfer=1, code="transport", cause="another path")
    tape.run()
    tape.hold_writes = False
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def late_messages() -> Tape:
    """Each message of a whole transfer once more after its end: nothing changes; ends are answered again."""
    tape = _whole(1000)
    said = [(step["at"], step["in"]) for step in tape.steps if "message" in step["in"]]
    for at, told in reversed(said):
        tape.input(at, told)
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def lost_messages() -> Tape:
    """The first of every kind of message is lost; timers say again what is true."""
    tape = Tape(pool=8, first_grant=4)
    tape.start()
    seen: set[tuple[str, str]] = set()

    def once(to: str, message: m.Message) -> bool:
        key = (to, type(message).__name__)
        lost = key not in seen
        seen.add(key)
        return lost

    tape.lose = once
    tape.offer(17, 1000)
    tape.receive(17)
    for _ in range(20):
        tape.run()
        tape.resend()
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def slab_replaced() -> Tape:
    """No fence comes: the slab gets fresh memory, and a Hello says so. What is still written lands nowhere."""
    tape = _in_the_middle(total=200, pool=4, slabs=2, first_grant=2)
    tape.event("receiver", "suspect", xfer=1, code="transport", cause="another path")
    while tape.mail:  # Revoke is lost, so that no Fenced comes
        tape.mail.popleft()
    tape.event("receiver", "fence_overdue", incarnation=1000)
    tape.run()
    tape.resend()
    tape.hold_writes = False
    tape.run()
    tape.assert_clean()
    return tape


def _group() -> Tape:
    tape = Tape(pool=4, first_grant=2, ranks=2)
    tape.start()
    tape.offer(17, 200)
    return tape


@scenario
def group_commits() -> Tape:
    """Two ranks: rank 1 is announced to after rank 0's Admitted, both vote, COMMIT to the leader, RUN to the other."""
    tape = _group()
    tape.receive(17, "rank0")
    tape.receive(17, "rank1")
    tape.run()
    for _ in range(3):
        tape.resend()
        tape.run()
    tape.assert_clean()
    return tape


@scenario
def group_drops() -> Tape:
    """The leader's caller cancels after both ranks have opened the room: the follower is told to drop it."""
    tape = _group()
    tape.hold_writes = True
    tape.receive(17, "rank0")
    tape.receive(17, "rank1")
    tape.run()
    tape.event("rank0", "cancel", xfer=1, code="cancelled", cause="not wanted any more")
    tape.run()
    tape.hold_writes = False
    tape.run()
    for _ in range(3):
        tape.resend()
        tape.run()
    tape.assert_clean()
    return tape


@scenario
def version_mismatch() -> Tape:
    """The receiver speaks another version: the sender keeps nothing of it and answers with its own Hello; the receiver,
    which reads there what the other side speaks, ends."""
    tape = Tape()
    tape.sides["sender"]["version"] = m.PROTOCOL_VERSION + 1
    tape.start()
    tape.offer(17, 100)
    tape.receive(17)
    tape.run()
    tape.event("sender", "cancel", offer=1, code="deadline", cause="nobody came")
    tape.run()
    return tape


@scenario
def unknown_room() -> Tape:
    """Nobody offers the room: the receiver gives up at its deadline, its loan comes back, and an offer that comes too
    late is told at once."""
    tape = Tape()
    tape.start()
    tape.receive(17)
    tape.run()
    tape.event("receiver", "fail", xfer=1, code="deadline", cause="not announced in time")
    tape.run()
    tape.offer(17, 100)
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def room_used_again() -> Tape:
    """The same room number twice, one after the other: two transfers, two ids."""
    tape = _whole(200)
    tape.offer(17, 300, content=3)
    tape.receive(17)
    tape.run()
    tape.assert_clean()
    return tape


@scenario
def receiver_restarts() -> Tape:
    """A new incarnation of the receiver opens the room: grants of the old one are of no use any more."""
    tape = _in_the_middle()
    tape.restart("receiver")
    tape.receive(17)
    tape.run()
    tape.hold_writes = False
    tape.run()
    tape.resend()
    tape.run()
    tape.assert_clean()
    return tape
