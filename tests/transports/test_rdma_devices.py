"""The RDMA devices of a host as a process sees them: which it may open, and how much it may lock for them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tensorferry.backends import _rdma

HAS_LOCK, HAS_NOT = "CapEff:\t0000000000004000\n", "CapEff:\t0000000000000000\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with an active device that this process can use."""
    write(tmp_path / "sys/class/infiniband_verbs/uverbs0/ibdev", "mlx5_0\n")
    write(tmp_path / "dev/infiniband/uverbs0", "")
    write(tmp_path / "proc/self/status", HAS_LOCK)
    for name in ("character_devices", "first_opened", "may_lock"):
        monkeypatch.setattr(_rdma, name, rooted(getattr(_rdma, name), tmp_path))
    return tmp_path


def rooted(of: object, root: Path) -> object:
    return lambda *given: of(*given, root)  # type: ignore[operator]


def limited(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (nbytes, nbytes))


def test_a_device_that_can_be_opened_and_memory_that_can_be_locked_are_all_that_is_wanted(device: Path) -> None:
    assert _rdma.why_not_usable(["mlx5_0"]) == ("", "")


def test_a_device_without_its_file_in_the_container_is_not_usable(device: Path) -> None:
    (device / "dev/infiniband/uverbs0").unlink()
    cause, remedy = _rdma.why_not_usable(["mlx5_0", "mlx5_1"])
    assert "/dev/infiniband/uverbs0 (mlx5_0): No such file" in cause
    assert "mlx5_1 has no character device" in cause
    assert "--device=/dev/infiniband" in remedy


def test_one_device_that_can_be_opened_is_enough(device: Path) -> None:
    assert _rdma.why_not_usable(["mlx5_1", "mlx5_0"]) == ("", "")


def test_too_little_locked_memory_is_told_with_its_remedy(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(device / "proc/self/status", HAS_NOT)
    limited(monkeypatch, 8 << 20)
    cause, remedy = _rdma.why_not_usable(["mlx5_0"])
    assert cause.startswith("`ulimit -l` allows 8192 KiB to be locked")
    assert "memlock=-1" in remedy
    limited(monkeypatch, _rdma.NEEDS_LOCKED)
    assert _rdma.why_not_usable(["mlx5_0"]) == ("", "")
    cause, _ = _rdma.why_not_usable(["mlx5_0"], 1 << 20)
    assert "pool, staging and the engine's own buffers: 132096 KiB" in cause
    limited(monkeypatch, _rdma.NEEDS_LOCKED + (1 << 20))
    assert _rdma.why_not_usable(["mlx5_0"], 1 << 20) == ("", "")
    limited(monkeypatch, resource.RLIM_INFINITY)
    assert _rdma.why_not_usable(["mlx5_0"]) == ("", "")


@pytest.mark.parametrize(
    ("status", "users", "may"),
    [
        (HAS_LOCK, "0 0 4294967295", True),
        (HAS_LOCK, "0 1000 1\n1 100000 65536", False),
        (HAS_NOT, "0 0 4294967295", False),
    ],
    ids=["held", "held in a user namespace of its own", "not held"],
)
def test_the_limit_does_not_count_for_who_holds_the_capability_where_the_kernel_asks(
    tmp_path: Path, status: str, users: str, may: bool
) -> None:
    write(tmp_path / "proc/self/status", status)
    write(tmp_path / "proc/self/uid_map", users)
    assert _rdma.may_lock(tmp_path) is may


def test_what_is_locked_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "proc/self/status", HAS_NOT + "VmPin:\t    6144 kB\n")
    limited(monkeypatch, 8 << 20)
    assert _rdma.why_not_locked(2 << 20, tmp_path) == ""
    assert _rdma.why_not_locked((2 << 20) + 1, tmp_path) == (
        "`ulimit -l` allows 8192 KiB to be locked, and 6144 KiB are"
    )
    limited(monkeypatch, resource.RLIM_INFINITY)
    assert _rdma.why_not_locked(1 << 40, tmp_path) == ""
