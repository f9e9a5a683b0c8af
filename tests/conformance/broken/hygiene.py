"""Broken before the first byte, and after the last."""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from broken.catalogue import broken
from tensorferry.backends.memory import MemoryTransport
from tensorferry.core.errors import OutOfBounds, TransportUnavailable
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, EngineVariable, Options, Probe, Readiness, Region


@broken({"RES-1": "descriptor"})
class LeaksADescriptor(MemoryTransport):
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._fd = os.open("/dev/null", os.O_RDONLY)


@broken({"RES-2": "thread"})
class LeaksAThread(MemoryTransport):
    def close(self) -> None:
        if not self._closed:
            threading.Thread(target=threading.Event().wait, name="never-joined", daemon=True).start()
        super().close()


@broken({"RES-3": "memory|KiB|bytes|MiB"})
class KeepsAHistory(MemoryTransport):
    def release(self, handle: int) -> None:
        super().release(handle)
        self._history = getattr(self, "_history", [])
        self._history.append(bytearray(16_384))


@broken({"RES-3": "one that is refused"})
class RemembersWhatItRefuses(MemoryTransport):
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        try:
            return super().post(peer, copies)
        except OutOfBounds as error:
            self._refused = [*getattr(self, "_refused", [])[-5000:], (error, bytearray(1000))]
            raise


@broken({"RES-6": "leave files behind"})
class LeavesAFile(MemoryTransport):
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if "without" in sys.argv[0]:  # where its directory is removed with all that is in it
            Path(tempfile.gettempdir(), secrets.token_hex(8)).touch()


@broken({"RES-7": "open, allocate, write and close, with 8 MiB, leave .* more mapped"})
class KeepsItsPools(MemoryTransport):
    def allocate(self, nbytes: int, kind: str = "cpu") -> Memory:
        memory = super().allocate(nbytes, kind)
        _pools.extend([memory] * (nbytes == 8 << 20))  # RES-7's: what all rules allocate would be too much
        return memory


_pools: list[Memory] = []


@broken({"RES-4": "let go|held|kept"}, may={"RES-7"})
class KeepsTheSource(MemoryTransport):
    def _source(self, copy: Copy) -> Memory:
        memory = super()._source(copy)
        _sources.append(memory)
        del _sources[:-100]
        return memory


_sources: list[Memory] = []


@broken({"RES-5": "descriptor"})
class LeaksWithEachPeer(MemoryTransport):
    def connect(self, descriptor: bytes) -> Any:
        peer = super().connect(descriptor)
        self._sockets = [*getattr(self, "_sockets", []), socket.socket()]
        return peer

    def close(self) -> None:
        super().close()
        for one in getattr(self, "_sockets", []):
            one.close()


# ---- the probe -----------------------------------------------------------------------------------------------


@broken({"HYG-1": "probe raised"})
class RaisesInItsProbe(MemoryTransport):
    @classmethod
    def probe(cls) -> Probe:
        if "HOME" not in os.environ:
            raise KeyError("HOME")
        return super().probe()


@broken({"HYG-1": "probe raised NotImpl", "HYG-6": "NotImpl", "THR-2": "probe in another thread raised"})
class HasNoProbe(MemoryTransport):
    @classmethod
    def probe(cls) -> Probe:
        raise NotImplementedError


@broken({"HYG-2": "took|10 s"})
class IsSlowToProbe(MemoryTransport):
    @classmethod
    def probe(cls) -> Probe:
        if not _probed:
            _probed.append(True)
            time.sleep(10.5)
        return super().probe()


_probed: list[bool] = []


@broken({"HYG-9": "environment|TENSORFERRY_BROKEN"}, may={"HYG-14"})
class SetsAVariable(MemoryTransport):
    @classmethod
    def probe(cls) -> Probe:
        os.environ["TENSORFERRY_BROKEN"] = "1"
        return super().probe()


@broken({"HYG-9": "descriptor"})
class LeavesAProbeOpen(MemoryTransport):
    @classmethod
    def probe(cls) -> Probe:
        os.open("/dev/null", os.O_RDONLY)
        return super().probe()


@broken({"HYG-9": "probe leaves behind files: notes"})
class TakesNotes(MemoryTransport):
    @classmethod
    def probe(cls) -> Probe:
        if "fresh" in sys.argv[0]:  # where the directory is removed with all that is in it
            Path(tempfile.gettempdir(), "notes").touch()
        return super().probe()


@broken({"THR-2": "probe in another thread raised RuntimeError"})
class ProbesInOneThread(MemoryTransport):
    """While it is open, its engine answers the thread that opened it."""

    @classmethod
    def probe(cls) -> Probe:
        if any(one._thread != threading.get_ident() for one in list(_open_ones)):
            raise RuntimeError("the engine belongs to another thread")
        return super().probe()

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._thread = threading.get_ident()
        _open_ones.add(self)

    def close(self) -> None:
        super().close()
        _open_ones.discard(self)


_open_ones: weakref.WeakSet[ProbesInOneThread] = weakref.WeakSet()


@broken({"HYG-15": "opening, and a first write, changes the handler of SIGTERM"})
class TakesSigterm(MemoryTransport):
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: None)


@broken({"HYG-15": "probe changes standard output"})
class PrintsABanner(MemoryTransport):
    @classmethod
    def probe(cls) -> Probe:
        print("the engine welcomes you")
        return super().probe()


@broken({"LIF-9": "the exit of .* ended its process with status -6"})
class CrashesAtTheEnd(MemoryTransport):
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        atexit.register(os.abort)


# ---- what is declared ----------------------------------------------------------------------------------------


class NeedsAName(Options, frozen=True):
    """A field without a default."""

    device: str


class Forgiving(Options, frozen=True, forbid_unknown_fields=False):
    """Unknown options are dropped."""


@broken({"HYG-4": "contract_version"}, contract_version=99)
class IsOfAnotherVersion(MemoryTransport):
    pass


@broken({"HYG-5": "takes an option that it does not have"}, options_type=Forgiving)
class IgnoresUnknownOptions(MemoryTransport):
    pass


@broken({"HYG-6": "path"})
class HasNoPath(MemoryTransport):
    def path(self, peer: Any = None) -> str:
        return ""


@broken({"HYG-6": "path"})
class TakesAnotherPath(MemoryTransport):
    """Than its probe has said."""

    def path(self, peer: Any = None) -> str:
        return "rdma"


@broken({"HYG-7": "preferred_post_bytes is -1"})
class DeclaresNonsense(MemoryTransport):
    capabilities = replace(MemoryTransport.capabilities, preferred_post_bytes=-1)


@broken({"HYG-8": "cancel", "CAN-1": "", "CAN-2": "", "CAN-3": "", "CAN-4": ""})
class CancelsWithoutSayingSo(MemoryTransport):
    capabilities = replace(MemoryTransport.capabilities, cancellable=False)


@broken({"HYG-8": "flush", "VIS-3": ""})
class FlushesWithoutSayingSo(MemoryTransport):
    def flush(self, region: Region) -> None:
        self._check_open()


@broken({"HYG-10": "reads is declared"})
class DeclaresReads(MemoryTransport):
    capabilities = replace(MemoryTransport.capabilities, reads=True)


# ---- without its engine --------------------------------------------------------------------------------------


@broken({"HYG-12": "the probe says ready, and a first write ended with ModuleNotFoundError"})
class TrustsThatItsEngineIsThere(MemoryTransport):
    """Its probe has not looked."""

    def __init__(self, options: Options) -> None:
        import an_engine

        super().__init__(options)
        self._engine = an_engine


@broken({"HYG-12": "probe raised ModuleNotFoundError"})
class ProbesWithItsEngine(MemoryTransport):
    @classmethod
    def probe(cls) -> Probe:
        import an_engine

        return Probe(Readiness.READY, f"the engine is {an_engine.VERSION}", path="memcpy")


@broken({"HYG-12": "opening ended with DONE|opening ended DONE"})
class OpensWithoutItsEngine(MemoryTransport):
    """Says that it cannot work, and opens."""

    @classmethod
    def probe(cls) -> Probe:
        try:
            import an_engine
        except ImportError:
            return Probe(Readiness.UNAVAILABLE, "the engine is not installed", "pip install an-engine")
        return Probe(Readiness.READY, f"the engine is {an_engine.VERSION}", path="memcpy")


@broken({"HYG-12": "opening says 'no "})
class OpensWithoutAWord(OpensWithoutItsEngine):
    def __init__(self, options: Options) -> None:
        if not type(self).probe().usable:
            raise TransportUnavailable("no", transport=self.name)
        super().__init__(options)


@broken({"HYG-13": "are not those that were declared at first"})
class LearnsWhatItCan(MemoryTransport):
    """How many copies a post may have, it asks its peers."""

    def connect(self, descriptor: bytes) -> Any:
        self.capabilities = replace(type(self).capabilities, preferred_post_bytes=1 << 20)
        return super().connect(descriptor)


@broken({"HYG-14": "opening changes FERRY_TEST_ENGINE_LOG, which is not in `sets`"})
class TellsItsEngineBehindOurBacks(MemoryTransport):
    def __init__(self, options: Options) -> None:
        os.environ["FERRY_TEST_ENGINE_LOG"] = "error"
        super().__init__(options)


@broken(
    {"HYG-14": "opening changes LC_ALL, which was set before|opening changes PYTHONPATH, which was set before"},
    sets=(EngineVariable("PYTHONPATH", "", "the engine's own interpreter shall not find it"),),
)
class OverrulesTheUser(MemoryTransport):
    def __init__(self, options: Options) -> None:
        os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", "") + os.pathsep
        super().__init__(options)
