"""The comparison with SGLang's interface: the adapter fits what is written down of 0.5.23, and drift is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import sglang_drift

# What SGLang's conn.py says, as far as callers go. `make sglang-signatures` reads the real one.
CONN = """
class KVPoll:
    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4

class KVTransferMetric:
    transfer_latency_s: float = None
    alloc_latency_s: float = None
    transfer_total_bytes: int = None

class BaseKVManager:
    supports_role_switch: bool = False
    def __init__(self, args, disaggregation_mode, server_args, is_mla_backend=False): ...
    def register_to_bootstrap(self): ...
    def should_verify_kv_checksum(self, bootstrap_addr): ...
    def teardown(self): ...

class BaseKVSender:
    def __init__(self, mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank=False): ...
    def init(self, num_kv_indices, aux_index=None): ...
    def send(self, kv_indices, state_indices=None, num_kv_tokens=None): ...
    def mark_prefill_complete(self): ...
    def pop_decode_prefix_len(self): ...
    def get_max_transfer_tokens(self): ...
    def should_send_kv_chunk(self, num_pages, last_chunk): ...
    def get_transfer_metric(self): ...
    def poll(self): ...
    def failure_exception(self): ...
    def clear(self): ...
    def abort(self): ...

class BaseKVReceiver:
    @property
    def supports_host_destination(self): ...
    def is_abort_release_safe(self): ...
    def __init__(self, mgr, bootstrap_addr, bootstrap_room=None): ...
    def init(self, prefill_dp_rank): ...
    def send_metadata(
        self, kv_indices, aux_index=None, state_indices=None, decode_prefix_len=None, destination=None
    ): ...
    def poll(self): ...
    def failure_exception(self): ...
    def clear(self): ...
    def abort(self): ...
"""

DRIFTS = {
    "a renamed argument": ("num_kv_tokens=None", "token_offset=0", "send: does not take 'token_offset'"),
    "arguments in another order": (
        "num_kv_indices, aux_index=None", "aux_index, num_kv_indices", "init: 'aux_index' is not in place 1"
    ),
    "an argument that may be left out": (
        "num_kv_indices, aux", "num_kv_indices=0, aux", "init: 'num_kv_indices' may not be left out"
    ),
    "a place of its own": ("bootstrap_room, req_has", "bootstrap_room, tp, req_has", "does not take 'tp'"),
    "a keyword": ("self, num_pages, last_chunk", "self, num_pages, last_chunk, *, now", "does not take 'now'"),
    "another method": ("def abort(self)", "def pause(self)", "FerryFakeReceiver lacks pause, which BaseKVReceiver has"),
    "another attribute": ("supports_role_switch", "supports_teleport", "FerryKVManager lacks supports_teleport"),
    "other values": ("Success = 4", "Success = 5", "KVPoll is"),
    "a metric": ("alloc_latency_s: float", "alloc_s: float", "KVTransferMetric has"),
    "a class that is gone": ("class BaseKVSender", "class KVSender", "no BaseKVSender any more"),
    "an enumeration that is gone": ("class KVPoll", "class TransferPoll", "no KVPoll any more"),
}  # fmt: skip


def test_the_adapter_fits_the_interface_as_it_is_written_down() -> None:
    assert sglang_drift.drift(CONN) == []


@pytest.mark.parametrize("what", DRIFTS)
def test_drift_is_noticed(what: str) -> None:
    old, new, told = DRIFTS[what]
    assert old in CONN
    assert told in "; ".join(sglang_drift.drift(CONN.replace(old, new)))


def test_an_installed_sglang_is_read_and_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conn = tmp_path / "sglang" / sglang_drift.CONN
    assert sglang_drift.main([str(tmp_path)]) == 3
    conn.parent.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "sglang-0.5.23.dist-info").mkdir()
    conn.write_text(CONN)
    assert sglang_drift.main([str(tmp_path)]) == 0
    assert "sglang 0.5.23: 0 differences" in capsys.readouterr().out
    conn.write_text(CONN.replace("Success = 4", "Success = 7"))
    assert sglang_drift.main([str(tmp_path)]) == 1
