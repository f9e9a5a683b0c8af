"""The scripted transports answer every verb for the handles that they make."""

from __future__ import annotations

import pytest
from faulty import FAIL, HOLD, LOSE, WRITE, FaultyMemory

from tensorferry.core.transport import Copy, RemoteRegion


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", [WRITE, FAIL, HOLD, LOSE])
def test_whether_a_source_is_free_is_answered_by_the_script(what: str) -> None:
    writer, owner = FaultyMemory(), FaultyMemory()
    try:
        writer.script = lambda n: what
        region = owner.register(owner.allocate(4096))
        peer = writer.connect(owner.describe())
        remote = RemoteRegion(region.id, region.generation)
        handle = writer.post(peer, [Copy(writer.allocate(4096), 0, remote, 0, 64)])
        if what in (HOLD, LOSE):
            assert not writer.source_free(handle)
            writer.let_go()
        while not writer.drained(handle):
            writer.poll(handle)
        assert writer.source_free(handle)
    finally:
        writer.close()
        owner.close()
