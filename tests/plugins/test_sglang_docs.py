"""docs/sglang.md says what the adapter does: its example runs, and its tables are the code's."""

from __future__ import annotations

import re
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tensorferry.core.settings import descriptions
from tensorferry.plugins.sglang import POLL_OF, FerryKVManager, FerryKVReceiver, FerryKVSender

DOC = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    example = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)[0]
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == "Success"
    assert "12000" in run.stdout


def test_the_classes_are_ours_and_for_a_transfer_that_is_none_sglangs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang 0.5.23 asks for them: KVArgs are every backend's, warm-up requests have the backend FAKE, and
    disagg_service makes a bootstrap server on the embedding side, and asks whether it is a subclass of SGLang's."""
    utils: Any = ModuleType("utils")
    utils.KVClassType = Enum("KVClassType", "KVARGS MANAGER SENDER RECEIVER BOOTSTRAP_SERVER")
    utils.TransferBackend = Enum("TransferBackend", "MOONCAKE FAKE")
    utils.get_kv_class = lambda backend, kind: ("SGLang's own", backend, kind)
    disaggregation: Any = ModuleType("disaggregation")
    disaggregation.utils = utils
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.disaggregation", disaggregation)
    kinds, fake, other = utils.KVClassType, utils.TransferBackend.FAKE, utils.TransferBackend.MOONCAKE

    exec(re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)[1], {})  # noqa: S102 - our own document
    for kind in kinds:
        assert utils.get_kv_class(fake, kind) == ("SGLang's own", fake, kind)
    assert utils.get_kv_class(other, kinds.KVARGS)[0] == "SGLang's own"
    assert utils.get_kv_class(other, kinds.MANAGER).func is FerryKVManager
    assert utils.get_kv_class(other, kinds.SENDER) is FerryKVSender
    assert utils.get_kv_class(other, kinds.RECEIVER) is FerryKVReceiver
    server = utils.get_kv_class(other, kinds.BOOTSTRAP_SERVER)
    assert not issubclass(server, ModuleType)
    server(host="0.0.0.0", port=8998)


def test_the_table_of_polls_is_the_codes() -> None:
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| `(\w+` = \d)", DOC, flags=re.MULTILINE))
    assert table == {str(status): f"{poll.name}` = {int(poll)}" for status, poll in POLL_OF.items()}


def test_the_table_of_names_is_the_settings() -> None:
    table = dict(re.findall(r"^\| `(SGLANG_\w+)` \| `(\w+)` \|", DOC, flags=re.MULTILINE))
    assert table == {alias: about.name for about in descriptions() for alias in about.aliases}
