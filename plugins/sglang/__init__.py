"""tensorferry under the names of SGLang's disaggregation interface (docs/sglang.md).

Nothing here imports SGLang: the classes have its methods and its KVPoll values, and take its objects for what they
have. `make sglang-signatures` compares them with a release of it.
"""

from __future__ import annotations

from tensorferry.plugins.sglang.buffers import Lease, MultimodalBuffers
from tensorferry.plugins.sglang.ends import FerryFakeReceiver, FerryKVReceiver, FerryKVSender, KVTransferMetric
from tensorferry.plugins.sglang.manager import FerryKVManager
from tensorferry.plugins.sglang.polls import POLL_OF, KVPoll

__all__ = [
    "POLL_OF",
    "FerryFakeReceiver",
    "FerryKVManager",
    "FerryKVReceiver",
    "FerryKVSender",
    "KVPoll",
    "KVTransferMetric",
    "Lease",
    "MultimodalBuffers",
]
