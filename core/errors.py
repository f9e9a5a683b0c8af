"""One taxonomy of errors for every engine, both sides and the wire.

An error answers four questions: whose fault it is, whether a retry can help, whether the memory involved may be
reused, and what to do about it (`hint`). Nothing is folded into "ERR" or -1: what a transport cannot tell apart is
`UnknownInFlight`, a first-class outcome, and memory under it is not reused until a fence proves it quiet.

`code` is the name that travels: `from_code` turns a peer's code back into the same class on the other side.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Fault(StrEnum):
    """Who has to act for the error to go away."""

    CALLER = "caller"  # an argument of this call, or the order of calls
    CONFIGURATION = "configuration"  # settings of one side, or a mismatch between the two
    PEER = "peer"  # the other process
    TRANSPORT = "transport"  # the engine, the link under it, or a GPU
    OURS = "ours"  # a defect in tensorferry: please report it


class FerryError(Exception):
    """Base of everything that tensorferry raises or stores on a transfer.

    `cause` says what happened, `hint` what helps; `room`, `peer` and `transport` say where. `retryable`: the same
    call can succeed later without a change. `memory_reusable`: nothing can still read or write the memory involved.
    """

    code: ClassVar[str] = "error"
    fault: ClassVar[Fault] = Fault.OURS
    retryable: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""

    def __init__(
        self,
        cause: str,
        *,
        hint: str = "",
        room: int | None = None,
        peer: str | None = None,
        transport: str | None = None,
        memory_reusable: bool = True,
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint or self.default_hint
        self.room = room
        self.peer = peer
        self.transport = transport
        self.memory_reusable = memory_reusable

    def __str__(self) -> str:
        where = ", ".join(
            f"{name} {value}"
            for name, value in (("room", self.room), ("peer", self.peer), ("transport", self.transport))
            if value is not None
        )
        text = f"{self.cause} [{where}]" if where else self.cause
        return f"{text}. {self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, object]:
        """The error as JSON-ready data: `{code, cause, hint, fault, retryable, room, peer, transport}`."""
        return {
            "code": self.code,
            "cause": self.cause,
            "hint": self.hint,
            "fault": str(self.fault),
            "retryable": self.retryable,
            "memory_reusable": self.memory_reusable,
            "room": self.room,
            "peer": self.peer,
            "transport": self.transport,
        }


# ---- the caller ----------------------------------------------------------------------------------------------


class BadTensor(FerryError):
    """A tensor's dtype, shape, device or length does not fit the layout or the announcement."""

    code, fault = "bad_tensor", Fault.CALLER


class BadCall(FerryError):
    """A call that its state forbids: put beyond the announced length, result before the end, use after close."""

    code, fault = "bad_call", Fault.CALLER


class RoomInUse(FerryError):
    """The room has a live transfer already."""

    code, fault, retryable = "room_in_use", Fault.CALLER, True
    default_hint = "Use another room number, or wait for the live transfer's end (or cancel it)"


class TooLarge(FerryError):
    """The announced length needs more memory than the whole destination budget."""

    code, fault = "too_large", Fault.CONFIGURATION
    default_hint = "Raise destination_budget on the language side, or send fewer tokens"


class Cancelled(FerryError):
    """The caller, or the other side's caller, cancelled the transfer."""

    code, fault = "cancelled", Fault.CALLER


# ---- configuration -------------------------------------------------------------------------------------------


class ConfigError(FerryError):
    """A setting is unknown or has a value that it cannot have."""

    code, fault = "config", Fault.CONFIGURATION


class UnknownOption(ConfigError):
    """A transport or endpoint was given an option that it does not have."""

    code = "unknown_option"


class UnknownTransport(ConfigError):
    """No installed distribution provides a transport of this name."""

    code = "unknown_transport"
    default_hint = "`tensorferry transports` lists what is installed"


class TransportUnavailable(ConfigError):
    """The transport is installed but cannot work here."""

    code = "transport_unavailable"
    default_hint = "`tensorferry doctor` tries each transport by itself and says what is missing"


class UnknownDirectory(ConfigError):
    """No installed distribution provides a directory of this scheme, or something that it needs is not installed."""

    code = "unknown_directory"


class NameTaken(FerryError):
    """A later incarnation has published itself under the same name: this one is not found by it any more."""

    code, fault = "name_taken", Fault.CONFIGURATION
    default_hint = "Give each embedding side a name of its own"


class LayoutMismatch(FerryError):
    """The two sides declare different components, dtypes or shapes."""

    code, fault = "layout_mismatch", Fault.CONFIGURATION
    default_hint = "Give both sides the same Layout (same components, dtypes and shapes per token)"


class GeometryMismatch(FerryError):
    """The two sides use different block sizes."""

    code, fault = "geometry_mismatch", Fault.CONFIGURATION
    default_hint = "Set the same block_size on both sides"


class TransportMismatch(FerryError):
    """The two sides have no transport in common."""

    code, fault = "transport_mismatch", Fault.CONFIGURATION
    default_hint = "Give both sides the same transport"


class GroupMismatch(FerryError):
    """The ranks of one room disagree about how many they are or who leads."""

    code, fault = "group_mismatch", Fault.CONFIGURATION


class VersionMismatch(FerryError):
    """The peer speaks another version of the protocol or of the transport contract."""

    code, fault = "version_mismatch", Fault.CONFIGURATION
    default_hint = "Install the same tensorferry version on both sides"


# ---- the peer ------------------------------------------------------------------------------------------------


class PeerUnreachable(FerryError):
    """Nobody answered at the sender's address."""

    code, fault, retryable = "peer_unreachable", Fault.PEER, True
    default_hint = "Check the address and that the embedding side is running and bound to it"


class PeerLost(FerryError):
    """The peer was there and is not any more: its process is gone, or it has not answered for peer_timeout."""

    code, fault, retryable = "peer_lost", Fault.PEER, True


class DirectoryUnavailable(FerryError):
    """The directory of names did not answer, or not as one does. Running transfers do not need it."""

    code, fault, retryable = "directory_unavailable", Fault.PEER, True
    default_hint = "Check the directory's URL and that its server runs and can be reached; or give the explicit address"


class UnknownName(FerryError):
    """Nobody is found under this name: never published, withdrawn, or expired."""

    code, fault, retryable = "unknown_name", Fault.PEER, True
    default_hint = "Check the name, and that the embedding side runs and publishes itself in the same directory"


class BadEntry(FerryError):
    """What stands in the directory under this name was not written by tensorferry."""

    code, fault = "bad_entry", Fault.PEER
    default_hint = "Delete it there, or use another name or another prefix"


class ContentChanged(FerryError):
    """The sender restarted with other content after rows of the old content had been handed to the caller."""

    code, fault, retryable = "content_changed", Fault.PEER, True
    default_hint = "Receive the room again; give `content_id` to make a restarted sender resume"


class ProtocolViolation(FerryError):
    """The peer contradicted something that it had said before."""

    code, fault = "protocol_violation", Fault.PEER


class IntegrityError(FerryError):
    """Rows arrived with a wrong digest, again and again. They were not delivered."""

    code, fault = "integrity", Fault.TRANSPORT


# ---- time and room -------------------------------------------------------------------------------------------


class DeadlineExceeded(FerryError):
    """The transfer did not finish, or was not announced, before its deadline."""

    code, fault, retryable = "deadline", Fault.PEER, True


class PoolTimeout(FerryError):
    """No pool block or no destination memory came free before the deadline (or at once, with on_exhausted=fail)."""

    code, fault, retryable = "pool_timeout", Fault.CONFIGURATION, True
    default_hint = "Raise pool_blocks or destination_budget, or lower the number of rooms at once"


class Overloaded(FerryError):
    """A bound on rooms, or on memory that a lost peer may still write to, is reached."""

    code, fault, retryable = "overloaded", Fault.CONFIGURATION, True


# ---- transports ----------------------------------------------------------------------------------------------


class TransportError(FerryError):
    """The engine refused or failed an operation, and nothing of it can still land."""

    code, fault, retryable = "transport", Fault.TRANSPORT, True


class OutOfBounds(TransportError):
    """A copy outside its region, or in a region that is retired or of another generation. No byte has moved."""

    code, fault, retryable = "out_of_bounds", Fault.CALLER, False


class UnknownInFlight(TransportError):
    """The engine cannot say whether bytes may still land: the memory waits for a fence."""

    code = "unknown_in_flight"


class PathMismatch(TransportError):
    """By the engine's word the bytes went another way than the required one. What came that way does not count."""

    code, retryable = "path_mismatch", False
    default_hint = "`tensorferry doctor` says what stands against RDMA; without `require` this is a warning"


class Unsupported(TransportError):
    """The transport does not declare this capability."""

    code, fault, retryable = "unsupported", Fault.CALLER, False


class DeviceError(FerryError):
    """A GPU, or the library that drives it, refused an operation or failed it."""

    code, fault = "device", Fault.TRANSPORT
    default_hint = "`nvidia-smi` and the kernel's log (dmesg, NVRM and Xid) say more"


class InternalError(FerryError):
    """A defect in tensorferry. One room's InternalError does not end the worker that serves the others."""

    code = "internal"
    default_hint = "Please report this with the log of tensorferry.*"


def _subclasses(cls: type[FerryError]) -> list[type[FerryError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _subclasses(child))]


BY_CODE: dict[str, type[FerryError]] = {cls.code: cls for cls in _subclasses(FerryError)}


def from_code(code: str, cause: str, *, room: int | None = None, peer: str | None = None) -> FerryError:
    """The error that a peer's `code` names; an unknown code is a ProtocolViolation that quotes it."""
    cause = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in cause
    )  # it is shown to people as it is
    cls = BY_CODE.get(code)
    if cls is None:
        return ProtocolViolation(f"the peer ended with an unknown code {code!r}: {cause}", room=room, peer=peer)
    return cls(cause, room=room, peer=peer)
