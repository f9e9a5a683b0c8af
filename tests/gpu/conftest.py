"""These tests run on a GPU or not at all. Under FERRY_NEEDS_GPU (`make cuda` sets it) they fail where there is none."""

from __future__ import annotations

import os

import pytest
import torch

from tensorferry.core.devices import RUNTIMES


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    cause, remedy = RUNTIMES["cuda"].why_not()
    if cause and os.environ.get("FERRY_NEEDS_GPU"):
        pytest.fail(f"{cause}. {remedy}")
    if cause:
        pytest.skip(f"needs gpu: {cause}")
    return torch.device("cuda", 0)
