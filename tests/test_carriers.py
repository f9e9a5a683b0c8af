"""The transports of one endpoint: what is registered where, which ways lead to a peer, what is proved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as replaced
from typing import Any

import pytest
from memory_kit import PlainTransport, RegisteringTransport

from tensorferry.core import messages as m
from tensorferry.core.carriers import LOOK_SECONDS, Carriers, Reach
from tensorferry.core.errors import (
    BadCall,
    ConfigError,
    FerryError,
    PathMismatch,
    PeerUnreachable,
    TransportError,
    TransportMismatch,
    TransportUnavailable,
    VersionMismatch,
)
from tensorferry.core.memory import Memory
from tensorferry.core.selection import Verdict
from tensorferry.core.staging import Stagings
from tensorferry.core.transport import CONTRACT_VERSION, Capabilities, PeerState, Probe, Region, Transport


class Named(PlainTransport):
    """A transport of any name and path. A peer is its descriptor; `states` says what becomes of it."""

    def __init__(self, name: str, path: str = "tcp", *, refuse: FerryError | None = None) -> None:
        super().__init__()
        self.name = name  # type: ignore[misc]
        self.way = path
        self.way_to_peer = path
        self.refuse = refuse
        self.refuse_memory = False
        self.states: dict[Any, PeerState] = {}
        self.peers: list[Any] = []
        self.closed = 0

    def path(self, peer: Any = None) -> str:
        return self.way if peer is None else self.way_to_peer

    def describe(self) -> bytes:
        return self.name.encode()

    def register(self, memory: Memory) -> Region:
        if self.refuse_memory:
            raise TransportError("locked memory is limited", transport=self.name)
        return super().register(memory)

    def connect(self, descriptor: bytes) -> Any:
        if self.refuse is not None:
            raise self.refuse
        assert descriptor == self.name.encode()
        if "peer" not in self.peers:
            self.peers.append("peer")
        return "peer"

    def disconnect(self, peer: Any) -> None:
        self.peers.remove(peer)

    def peer_state(self, peer: Any) -> PeerState:
        return self.states.get(peer, PeerState.ALIVE)

    def close(self) -> None:
        self.closed += 1


class SameHost(Named):
    capabilities = replaced(PlainTransport.capabilities, same_host_only=True)


class Choosy(Named):
    capabilities = replaced(PlainTransport.capabilities, allocates_targets=True)


def hello(*offers: tuple[str, str] | m.Offer, slabs: int = 0) -> m.Hello:
    regions = m.pack_regions((k, 7) for k in range(slabs))
    made = [
        o if isinstance(o, m.Offer) else m.Offer(o[0], CONTRACT_VERSION, o[1], o[0].encode(), regions) for o in offers
    ]
    return m.Hello(
        src=5, dst=1, min_live=1, version=1, name="peer", layout=bytes(16), block_size=1, pool_blocks=slabs,
        slabs=slabs, generations=m.pack_generations([1] * slabs), offers=tuple(made), revision=1, ack=0,
    )  # fmt: skip


def lanes(reach: Reach) -> list[str]:
    return [lane.transport.name for lane in reach.lanes]


def reasons(reach: Reach) -> dict[str, str]:
    return {v.name: v.reason for v in reach.verdicts}


# ---- opening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[], [Named("a"), Named("a")]])
def test_transports_of_one_name_or_none_are_refused(given: Sequence[Transport]) -> None:
    with pytest.raises(BadCall):
        Carriers(given)


def test_what_was_not_even_opened_has_its_reason_in_every_answer() -> None:
    idle = Verdict("mooncake", "tcp", False, "taken only when it is named: there is no RDMA device")
    with pytest.raises(TransportUnavailable, match=r"a goes over tcp \(for tests\); not mooncake \(.*no RDMA device"):
        Carriers([Named("a")], require="rdma", passed_over=[idle])
    carriers = Carriers([Named("a")], passed_over=[idle])
    assert carriers.reach(hello(("a", "tcp")), "peer").verdicts[1:] == [idle]
    reach, _ = carriers.survey(hello(("mooncake", "rdma"), ("other", "tcp")), "peer")
    assert reasons(reach) == {
        "a": "the peer does not offer it",
        "mooncake": f"the peer has it, and here: {idle.reason}",
        "other": "only the peer has it",
    }
    with pytest.raises(TransportMismatch, match=r"this side has a, not mooncake .*, the peer offers mooncake"):
        carriers.reach(hello(("mooncake", "rdma")), "peer")


def test_what_is_required_and_not_there_fails_closed() -> None:
    with pytest.raises(
        TransportUnavailable, match=r"rdma is required.*a goes over tcp \(for tests\); b goes over memcpy"
    ):
        Carriers([Named("a"), Named("b", "memcpy")], require="rdma")

    class Raises(Named):
        @classmethod
        def probe(cls) -> Probe:
            raise RuntimeError("not allowed to")

    with pytest.raises(TransportUnavailable, match=r"no transport here has it: a goes over tcp \["):
        Carriers([Raises("a")], require="rdma")


def test_what_cannot_take_the_required_path_is_not_offered() -> None:
    carriers = Carriers([Named("a"), Named("b", "rdma")], require="rdma")
    assert [offer.name for offer in carriers.offers()] == ["b"]
    assert [v.name for v in carriers.rejected] == ["a"]


def test_all_are_closed_even_if_one_of_them_raises(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Named):
        def close(self) -> None:
            raise RuntimeError("no")

    last = Named("z")
    Carriers([Bad("a"), last]).close()
    assert last.closed == 1
    assert "a.close raised" in caplog.text


# ---- memory ------------------------------------------------------------------------------------------------------


def test_memory_is_registered_with_every_transport_and_offered_by_each_ones_names() -> None:
    one, other = Named("one"), Named("other")
    other.register(other.allocate(64))  # so that the two do not number alike
    carriers = Carriers([one, other])
    slabs = [carriers.register(carriers.allocate(4096)) for _ in range(2)]
    told = {offer.name: m.unpack_regions(offer.regions) for offer in carriers.offers(slabs)}
    assert told == {name: [(s[name].id, s[name].generation) for s in slabs] for name in ("one", "other")}
    assert told["one"] != told["other"]
    carriers.retire(slabs[0])
    assert (len(one.retired), len(other.retired)) == (1, 1)


def test_the_pool_lies_where_the_one_that_must_make_it_says() -> None:
    plain, choosy, second = Named("a", "rdma"), Choosy("b"), Choosy("c")
    carriers = Carriers([plain, choosy, second])
    made: list[int] = []
    choosy.allocate = lambda nbytes, kind="cpu": made.append(nbytes) or PlainTransport.allocate(choosy, nbytes)  # type: ignore[method-assign, func-returns-value]
    carriers.register(carriers.allocate(100))
    assert made == [100]
    assert [t.name for t in carriers.transports] == ["a", "b"]
    assert second.closed == 1
    assert "b comes first" in carriers.rejected[0].reason


def test_a_transport_that_cannot_register_the_pool_is_not_used_and_the_others_go_on() -> None:
    weak, strong = Named("weak", "rdma"), Named("strong")
    weak.refuse_memory = True
    carriers = Carriers([weak, strong])
    assert list(carriers.register(carriers.allocate(64))) == ["strong"]
    assert [offer.name for offer in carriers.offers()] == ["strong"]
    assert "locked memory" in carriers.rejected[0].reason
    assert weak.closed == 1


def test_a_transport_that_peers_were_told_of_is_used_no_more_and_stays_open_until_the_end() -> None:
    """Its end would be that of this process to them, and what they write by it is still to come."""
    weak, strong = Named("weak", "rdma"), Named("strong", "memcpy")
    weak.capabilities = replaced(PlainTransport.capabilities, needs_flush=True)  # type: ignore[misc]
    flushed: list[Region] = []
    weak.flush = flushed.append  # type: ignore[method-assign, assignment]
    carriers = Carriers([weak, strong])
    slab = carriers.register(carriers.allocate(64))
    carriers.offers([slab])
    reach = carriers.reach(hello(("weak", "rdma"), ("strong", "memcpy")), "peer")
    weak.refuse_memory = True
    assert list(carriers.register(carriers.allocate(64))) == ["strong"]
    assert [offer.name for offer in carriers.offers()] == ["strong"]
    assert weak.closed == 0

    again = carriers.reach(hello(("weak", "rdma"), ("strong", "memcpy")), "peer", reach)
    assert (lanes(again), [lane.transport for lane in again.watched]) == (["strong"], [weak])
    assert reasons(again)["weak"].startswith("the peer has it, and here: it could not register the pool")
    strong.states["peer"] = PeerState.GONE
    assert again.ended
    assert not again.quiet  # as long as the peer may still write by the other
    weak.states["peer"] = PeerState.GONE
    assert again.quiet
    carriers.flush(slab)
    carriers.retire(slab)
    assert (flushed, weak.retired) == ([slab["weak"]], [slab["weak"]])
    again.disconnect()
    assert weak.peers == strong.peers == []
    carriers.close()
    assert weak.closed == 1


def test_the_only_transports_refusal_is_the_callers() -> None:
    alone = Named("alone")
    alone.refuse_memory = True
    carriers = Carriers(alone)
    with pytest.raises(TransportError, match="locked memory"):
        carriers.register(carriers.allocate(64))


def test_transports_that_read_any_memory_share_one_staging() -> None:
    class Registering(Named):
        capabilities = Capabilities(registers_sources=True)

    one, two, third = Named("one"), Named("two"), Registering("three")
    stagings = Stagings(Carriers([one, two, third]), 4096)
    assert stagings.of(one) is stagings.of(two) is not stagings.of(third)
    assert (one.registered, third.registered) == (0, 1)
    stage = stagings.of(third).take(100)
    assert stage is not None
    assert stagings.taken_bytes == 128
    stagings.of(third).give(stage)
    stagings.close()
    assert len(third.retired) == 1


def test_a_transport_that_cannot_register_its_staging_is_not_used() -> None:
    class Registering(Named):
        capabilities = Capabilities(registers_sources=True)

    weak, strong = Registering("weak"), Named("strong")
    weak.refuse_memory = True
    carriers = Carriers([weak, strong])
    Stagings(carriers, 4096)
    assert carriers.transports == [strong]
    with pytest.raises(TransportError):
        Stagings(Carriers(_refusing(RegisteringTransport())), 4096)
    with pytest.raises(ConfigError):
        Stagings(carriers, 1)


def _refusing(transport: RegisteringTransport) -> RegisteringTransport:
    def register(memory: Memory) -> Region:
        raise TransportError("no")

    transport.register = register  # type: ignore[method-assign]
    return transport


# ---- what peers are told ------------------------------------------------------------------------------------------


def test_a_transport_that_is_found_elsewhere_since_is_news_at_most_once_in_a_while() -> None:
    one, other = Named("tcp"), Named("nixl")
    carriers = Carriers([one, other])
    told = carriers.offers()
    assert carriers.news(told, 10.0) == told
    one.describe = lambda: b"tcp, at another address"  # type: ignore[method-assign]
    assert carriers.news(told, 10.0 + LOOK_SECONDS / 2) is told  # whoever knocks again and again costs no more
    since = carriers.news(told, 10.0 + LOOK_SECONDS)
    assert {offer.name: offer.descriptor for offer in since} == {"tcp": b"tcp, at another address", "nixl": b"nixl"}


def test_what_cannot_be_said_again_as_a_whole_stays_as_it_was() -> None:
    one, other = Named("tcp"), Named("nixl")
    carriers = Carriers([one, other])
    told = carriers.offers()
    one.describe = lambda: {}["a defect"]  # type: ignore[method-assign]
    assert carriers.news(told, 10.0) is told
    del one.describe  # type: ignore[method-assign]
    carriers.reject(other, "it went lame")
    assert carriers.news(told, 20.0) is told  # its writes have to be proved ended as well


# ---- reaching a peer ---------------------------------------------------------------------------------------------


def test_the_best_that_both_have_carries_and_the_rest_follows() -> None:
    carriers = Carriers([Named("tcp"), Named("mooncake", "rdma"), Named("shm", "memcpy")])
    reach = carriers.reach(hello(("shm", "memcpy"), ("tcp", "tcp"), ("acme", "x"), slabs=2), "peer")
    assert lanes(reach) == ["shm", "tcp"]
    assert reach.lane.regions == [(0, 7), (1, 7)]
    assert reasons(reach) == {
        "shm": "first choice: over memcpy",
        "tcp": "follows shm: over tcp",
        "mooncake": "the peer does not offer it",
        "acme": "only the peer has it",
    }


def test_a_transport_that_does_not_reach_this_peer_gives_way_and_says_why() -> None:
    carriers = Carriers(
        [SameHost("shm", "memcpy", refuse=TransportMismatch("the peer runs on another host")), Named("tcp")]
    )
    reach = carriers.reach(hello(("shm", "memcpy"), ("tcp", "tcp")), "peer")
    assert lanes(reach) == ["tcp"]
    assert reasons(reach)["shm"] == "the peer runs on another host"
    assert reasons(reach)["tcp"] == "first choice of what is left: over tcp"
    assert not reach.blind  # a mismatch holds for both sides: the peer cannot use it either


def test_a_way_over_a_network_that_we_do_not_see_may_be_seen_by_the_peer() -> None:
    apart = TransportMismatch("the peer listens on loopback only")
    carriers = Carriers([Named("mooncake", "rdma"), Named("tcp", refuse=apart)])
    reach = carriers.reach(hello(("mooncake", "rdma"), ("tcp", "tcp")), "peer")
    assert lanes(reach) == ["mooncake"]
    assert reach.blind == ("tcp",)


def test_what_we_may_not_use_the_peer_may(caplog: pytest.LogCaptureFixture) -> None:
    carriers = Carriers([Named("mooncake", "rdma"), Named("nixl", "rdma")], require="rdma")
    reach = carriers.reach(hello(("mooncake", "rdma"), ("nixl", "tcp")), "peer")
    assert lanes(reach) == ["mooncake"]
    assert reach.blind == ("nixl",)


def test_with_one_transport_its_own_error_is_told() -> None:
    carriers = Carriers(Named("tcp", refuse=PeerUnreachable("no route to host")))
    with pytest.raises(PeerUnreachable, match="no route to host"):
        carriers.reach(hello(("tcp", "tcp")), "peer")


def test_where_nothing_joins_the_sides_every_reason_is_told() -> None:
    ours = [
        Named("shm", "memcpy", refuse=TransportMismatch("another host")),
        Named("tcp", refuse=PeerUnreachable("no")),
    ]
    with pytest.raises(TransportMismatch, match="shm: another host; tcp: no"):
        Carriers(ours).reach(hello(("tcp", "tcp"), ("shm", "memcpy")), "peer")
    ours[1].refuse = TransportMismatch("it listens on loopback only", hint="Set its option host")
    with pytest.raises(TransportMismatch, match="loopback only") as caught:
        Carriers(ours).reach(hello(("tcp", "tcp"), ("shm", "memcpy")), "peer")
    assert caught.value.hint == "Set its option host"
    with pytest.raises(TransportMismatch, match="this side has tcp, the peer offers shm"):
        Carriers(Named("tcp")).reach(hello(("shm", "memcpy")), "peer")
    with pytest.raises(TransportMismatch, match="the peer offers none"):
        Carriers(Named("tcp")).reach(hello(), "peer")
    with pytest.raises(VersionMismatch, match="contract 99"):
        Carriers(Named("tcp")).reach(hello(m.Offer("tcp", 99, "tcp", b"", b"")), "peer")


@pytest.mark.parametrize("regions", [b"torn", m.pack_regions([(0, 1)]), b""])
def test_an_offer_that_names_other_slabs_than_the_hello_is_no_way(regions: bytes) -> None:
    carriers = Carriers([Named("shm", "memcpy"), Named("tcp")])
    odd = m.Offer("shm", CONTRACT_VERSION, "memcpy", b"shm", regions)
    reach = carriers.reach(hello(odd, ("tcp", "tcp"), slabs=2), "peer")
    assert lanes(reach) == ["tcp"]
    assert reach.blind == ("shm",)


def test_a_path_that_turns_out_otherwise_for_this_peer_is_refused_where_it_is_required() -> None:
    engine = Named("mooncake", "rdma")
    engine.way_to_peer = "tcp"
    with pytest.raises(TransportMismatch, match="rdma is required, and the path to this peer is tcp"):
        Carriers(engine, require="rdma").reach(hello(("mooncake", "rdma")), "peer")
    assert not engine.peers  # and nothing is left of the attempt
    with pytest.raises(TransportMismatch, match="the peer's path is tcp") as caught:
        Carriers(engine, require="rdma").reach(hello(("mooncake", "tcp")), "peer")
    assert "tensorferry doctor" in caught.value.hint  # both have the same transport: that is no remedy


def test_what_connect_raises_against_the_contract_is_a_typed_error() -> None:
    class Broken(Named):
        def connect(self, descriptor: bytes) -> Any:
            raise KeyError("engine")

    with pytest.raises(TransportError, match="KeyError"):
        Carriers(Broken("tcp")).reach(hello(("tcp", "tcp")), "peer")


# ---- proofs ------------------------------------------------------------------------------------------------------


def test_blocks_are_free_only_when_every_way_is_proved_quiet() -> None:
    one, other = Named("shm", "memcpy"), Named("tcp")
    reach = Carriers([one, other]).reach(hello(("shm", "memcpy"), ("tcp", "tcp")), "peer")
    assert not reach.quiet
    assert not reach.ended
    one.states["peer"] = PeerState.GONE
    assert reach.ended
    assert not reach.quiet
    other.states["peer"] = PeerState.GONE
    assert reach.quiet


def test_a_way_that_only_the_peer_may_have_rules_out_a_proof() -> None:
    one, other = Named("shm", "memcpy"), Named("tcp", refuse=PeerUnreachable("we cannot see it; it may see us"))
    reach = Carriers([one, other]).reach(hello(("shm", "memcpy"), ("tcp", "tcp")), "peer")
    one.states["peer"] = PeerState.GONE
    assert reach.ended
    assert not reach.quiet


# ---- falling back ------------------------------------------------------------------------------------------------


def test_the_next_in_line_carries_after_a_fall_back_and_a_newer_hello_does_not_change_that() -> None:
    carriers = Carriers([Named("shm", "memcpy"), Named("tcp"), Named("acme", "x")])
    said = hello(("shm", "memcpy"), ("tcp", "tcp"), ("acme", "x"))
    reach = carriers.reach(said, "peer")
    assert reach.fall_back("three writes failed")
    assert lanes(reach) == ["tcp", "acme", "shm"]
    assert [v.name for v in reach.verdicts] == ["tcp", "acme", "shm"]
    assert reasons(reach)["shm"] == "the last resort: three writes failed"
    again = carriers.reach(said, "peer", reach)
    assert lanes(again) == ["tcp", "acme", "shm"]


def test_the_best_lane_has_another_chance() -> None:
    carriers = Carriers([Named("shm", "memcpy"), Named("tcp"), Named("acme", "x")])
    reach = carriers.reach(hello(("shm", "memcpy"), ("tcp", "tcp"), ("acme", "x")), "peer")
    assert not reach.fallen
    assert not reach.prefer_again()
    reach.fall_back("three writes failed")
    reach.fall_back("so did these")
    assert lanes(reach) == ["acme", "shm", "tcp"]
    assert reach.fallen
    assert reach.prefer_again()
    assert lanes(reach) == ["shm", "acme", "tcp"]
    assert reasons(reach)["shm"] == "first choice, tried again: over memcpy"
    assert not reach.fallen


def test_what_the_allocator_is_does_not_outlive_its_rejection() -> None:
    weak, strong = Named("weak", "rdma"), Named("strong")
    carriers = Carriers([weak, strong])
    carriers.reject(weak, "a test")
    made: list[int] = []
    strong.allocate = lambda nbytes, kind="cpu": made.append(nbytes) or PlainTransport.allocate(strong, nbytes)  # type: ignore[method-assign, func-returns-value]
    carriers.allocate(64)
    assert made == [64]


def test_a_named_transport_is_never_replaced() -> None:
    reach = Carriers(Named("shm", "memcpy")).reach(hello(("shm", "memcpy"), ("tcp", "tcp")), "peer")
    assert not reach.fall_back("three writes failed")
    assert lanes(reach) == ["shm"]


# ---- what the engine says after a write --------------------------------------------------------------------------


def two_ways(require: str = "") -> tuple[Named, Named, Carriers]:
    engine, other = Named("mooncake", "rdma"), Named("nixl", "rdma")
    return engine, other, Carriers([engine, other], require=require)


BOTH = (("mooncake", "rdma"), ("nixl", "rdma"))


def test_a_path_that_is_as_chosen_is_nothing_to_talk_of(caplog: pytest.LogCaptureFixture) -> None:
    _, _, carriers = two_ways()
    reach = carriers.reach(hello(*BOTH), "peer")
    before = list(reach.verdicts)
    assert reach.check(reach.lane) is None
    assert (reach.path, reach.verdicts, caplog.text) == ("rdma", before, "")


def test_an_engine_that_went_another_way_is_a_warning_once_and_the_verdict_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, _, carriers = two_ways()
    said = hello(*BOTH)
    reach = carriers.reach(said, "peer")
    engine.way_to_peer = "tcp"
    for _ in range(3):
        assert reach.check(reach.lane) is None
    reach = carriers.reach(said, "peer", reach)  # a newer Hello does not make it news
    assert reach.check(reach.lane) is None
    assert (reach.lane.transport, reach.path) == (engine, "tcp")
    assert reach.verdicts[0].path == "tcp"
    assert "chosen over rdma" in reasons(reach)["mooncake"]
    assert "bytes go over tcp" in reasons(reach)["mooncake"]
    assert caplog.text.count("chosen over rdma") == 1


def test_the_peers_word_on_its_writes_counts_as_well(caplog: pytest.LogCaptureFixture) -> None:
    engine, _, carriers = two_ways()
    said = hello(*BOTH)
    reach = carriers.reach(said, "peer")
    for _ in range(3):
        assert reach.hear(reach.lane, "tcp") is None
        assert reach.check(reach.lane) is None  # this side's engine sees nothing of it, and has said nothing new
    assert (reach.lane.transport, reach.way) == (engine, ("mooncake", "tcp"))
    assert reasons(reach)["mooncake"] == "chosen over rdma, and by the sender's word its bytes go over tcp"
    assert caplog.text.count("chosen over rdma") == 1


@pytest.mark.parametrize("told", ["tcp", "memcpy"])
def test_where_a_path_is_required_the_peers_word_is_held_against_it(told: str) -> None:
    _, other, carriers = two_ways("rdma")
    reach = carriers.reach(hello(*BOTH), "peer")
    strayed = reach.lane
    assert reach.hear(strayed, "rdma", carriers.require) is None
    error = reach.hear(strayed, told, carriers.require)
    assert isinstance(error, PathMismatch)
    assert f"by the sender's word its bytes go over {told}" in error.cause
    assert reach.lane.transport is other
    assert reach.hear(strayed, "rdma", carriers.require) is error  # it is used no more


def test_an_engine_that_went_a_better_way_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    engine = Named("mooncake", "tcp")
    reach = Carriers(engine).reach(hello(("mooncake", "tcp")), "peer")
    engine.way_to_peer = "rdma"
    assert reach.check(reach.lane) is None
    assert (reach.path, caplog.text) == ("rdma", "")


def test_where_a_path_is_required_another_one_is_an_error_that_names_both_and_the_way_is_used_no_more() -> None:
    engine, other, carriers = two_ways("rdma")
    said = hello(*BOTH)
    reach = carriers.reach(said, "peer")
    engine.way_to_peer = "tcp"
    strayed = reach.lane
    error = reach.check(strayed, carriers.require)
    assert isinstance(error, PathMismatch)
    assert "rdma is required" in error.cause
    assert "over tcp" in error.cause
    assert reach.lane.transport is other
    assert not reach.fall_back("three writes failed")  # not to that one
    assert [(v.name, v.viable) for v in reach.verdicts] == [("nixl", True), ("mooncake", False)]
    engine.way_to_peer = "rdma"
    again = carriers.reach(said, "peer", reach)
    assert lanes(again) == ["nixl", "mooncake"]  # connected: what it may still write has to be watched
    assert again.check(again.lanes[1], carriers.require) is error
    engine.states["peer"] = PeerState.GONE
    assert not again.quiet


def test_where_the_only_way_has_strayed_nothing_joins_the_sides_any_more() -> None:
    engine = Named("mooncake", "rdma")
    carriers = Carriers(engine, require="rdma")
    reach = carriers.reach(hello(("mooncake", "rdma")), "peer")
    engine.way_to_peer = "tcp"
    error = reach.check(reach.lane, carriers.require)
    with pytest.raises(PathMismatch) as raised:
        carriers.reach(hello(("mooncake", "rdma")), "peer", reach)
    assert raised.value is error
    assert engine.peers == ["peer"]


def test_an_engine_that_cannot_say_fails_closed_where_a_path_is_required() -> None:
    engine, _, carriers = two_ways("rdma")
    reach = carriers.reach(hello(*BOTH), "peer")
    engine.path = lambda peer=None: {}["no"]  # type: ignore[method-assign]
    assert isinstance(reach.check(reach.lane, carriers.require), PathMismatch)


def test_what_an_engine_knows_of_this_peer_before_any_write_is_what_was_chosen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Named("nixl", "rdma")
    engine.way_to_peer = "memcpy"
    reach = Carriers(engine).reach(hello(("nixl", "rdma")), "peer")
    assert (reach.path, reach.verdicts[0].path) == ("memcpy", "memcpy")
    assert reach.verdicts[0].reason == "first choice: over rdma; memcpy to this peer"
    assert reach.check(reach.lane) is None
    assert caplog.text == ""
