"""SGLang's poll values, and which of our statuses is which."""

from __future__ import annotations

from enum import IntEnum
from types import MappingProxyType

from tensorferry.core.transfer import Status


class KVPoll(IntEnum):
    """As in SGLang, whose ranks agree by the least of their values: Failed has to be the smallest."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


POLL_OF = MappingProxyType(
    {
        Status.BOOTSTRAPPING: KVPoll.WaitingForInput,
        Status.WAITING_FOR_INPUT: KVPoll.WaitingForInput,
        Status.TRANSFERRING: KVPoll.Transferring,
        Status.SUCCESS: KVPoll.Success,
        Status.FAILED: KVPoll.Failed,
    }
)
"""Of a room that is open. An end whose room is not open yet is Bootstrapping until its address is known, then
WaitingForInput; as a poll never goes back, an open room is no less than that while its sender has not been met."""
