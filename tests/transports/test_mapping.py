"""What is said about the memory that can be had, on hosts and in containers of either kind."""

from __future__ import annotations

import io
import sys

import pytest

from tensorferry.core import memory

GIB = 1 << 30
V1 = "/sys/fs/cgroup/memory"
V2 = "/sys/fs/cgroup"


def on(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> int:
    def opened(path: str, **_: object) -> io.StringIO:
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr(memory, "open", opened, raising=False)
    return memory.available_bytes()


HOST = {"/proc/meminfo": f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n"}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, sys.maxsize),
        (HOST, 8 * GIB),
        ({**HOST, f"{V2}/memory.max": "max\n", f"{V2}/memory.current": "5\n"}, 8 * GIB),
        ({**HOST, f"{V2}/memory.max": f"{3 * GIB}\n", f"{V2}/memory.current": f"{GIB}\n"}, 2 * GIB),
        (
            {
                **HOST,
                f"{V2}/memory.max": f"{3 * GIB}",
                f"{V2}/memory.current": f"{2 * GIB}",
                f"{V2}/memory.stat": f"anon 7\ninactive_file {GIB}\n",
            },
            2 * GIB,
        ),
        ({**HOST, f"{V2}/memory.max": f"{GIB}", f"{V2}/memory.current": f"{2 * GIB}"}, 0),
        (
            {
                **HOST,
                f"{V1}/memory.limit_in_bytes": f"{4 * GIB}",
                f"{V1}/memory.usage_in_bytes": f"{3 * GIB}",
                f"{V1}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
            },
            2 * GIB,
        ),
        (
            {**HOST, f"{V1}/memory.limit_in_bytes": "9223372036854771712", f"{V1}/memory.usage_in_bytes": "1"},
            8 * GIB,
        ),
        ({"/proc/meminfo": "MemAvailable:\n"}, sys.maxsize),
    ],
    ids=["nothing known", "host", "no limit", "limit", "cache", "over the limit", "v1", "v1 without limit", "odd"],
)
def test_the_least_of_host_and_container_counts(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], available: int
) -> None:
    assert on(monkeypatch, files) == available


def test_here_something_is_available() -> None:
    assert 0 < memory.available_bytes() < sys.maxsize
