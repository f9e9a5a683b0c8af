"""The buffer API of earlier deployments, over transfers that look after their own memory.

There, the event loop allocated blocks, read them, freed them and allocated again for the rest. Here the protocol does
all that. What is left for the loop to hold is a `Lease`: one request's rows, to be sent or as they were received.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from tensorferry.core.arguments import INT64, integer, sixteen_bytes
from tensorferry.core.errors import BadCall, BadTensor, FerryError
from tensorferry.core.handles import ReceiveTransfer, SendTransfer
from tensorferry.core.layout import Layout
from tensorferry.core.settings import Settings

log = logging.getLogger("tensorferry.sglang")

INT32 = torch.iinfo(torch.int32)


class Lease:
    """What `alloc` gives: one request's place. It stands where block numbers stood, and holds no block itself.

    `len(lease)` is the number of blocks that its first grant asks for, so that `len(lease) * block_size` goes on
    meaning what it meant. It is not to be indexed: blocks belong to the protocol, and change hands between rounds.
    """

    def __init__(self, req_id: object, num_tokens: int, blocks: int, *, fake: bool) -> None:
        self.req_id = req_id
        self.num_tokens = num_tokens
        self.fake = fake
        """A dummy rank's: it takes part in the group's decision and receives no rows."""
        self.rows: dict[str, torch.Tensor] = {}
        """Embedding side: what `set_buf` took, token-major, by component."""
        self.mrope_delta = 0
        self.content_id: bytes | None = None
        self.problem: FerryError | None = None
        """Why `set_buf` could not take the request's tensors: sending the lease makes that request fail with it."""
        self.transfer: SendTransfer | ReceiveTransfer | None = None
        """The room that this lease went into, once there is one."""
        self.freed = False
        self._blocks = blocks

    def __len__(self) -> int:
        return self._blocks

    def __repr__(self) -> str:
        return f"<Lease {self.req_id!r}: {self.num_tokens} tokens, {self.transfer or 'no room yet'}>"


class MultimodalBuffers:
    """`alloc`, `free`, `get_buf`, `set_buf` and `available_size`, for either side: allocator and buffers in one.

    A process has one for each manager (`manager.buffers`).
    """

    def __init__(self, layout: Layout, settings: Settings, *, receives: bool) -> None:
        self.layout = layout
        self.block_size = settings.block_size
        self._settings = settings
        self._receives = receives
        self._lock = threading.Lock()
        self._leases: set[Lease] = set()

    def available_size(self) -> int:
        """How many more leases there can be: as many as rooms (`max_rooms`). Memory is not counted here: a transfer
        that finds no room in the pool, or in the budget, waits for it."""
        with self._lock:
            return self._settings.max_rooms - len(self._leases)

    def alloc(self, num_tokens: int, req_id: object = None, fake: bool = False) -> Lease | None:
        """A place for one request, or None while there are as many as can be.

        `num_tokens`: on the embedding side the request's length. On the language side it is noted and nothing else:
        the first grant is the setting `first_grant`, whose name in the environment is also what an event loop asks
        for here.
        """
        tokens = integer(num_tokens, "num_tokens")
        wish = self._settings.first_grant if self._receives else tokens
        blocks = -(-wish // self.block_size)
        if self._receives:
            blocks = min(blocks, self._settings.pool_blocks)
        lease = Lease(req_id, tokens, max(1, blocks), fake=bool(fake))
        with self._lock:
            if len(self._leases) >= self._settings.max_rooms:
                return None
            self._leases.add(lease)
        return lease

    def free(self, block_indices: Lease | None, req_id: object = None, fake: bool = False) -> None:
        """The rows are not wanted any more. Cancels a room that is still open, on both sides. Tensors that `get_buf`
        gave stay the caller's. Again, or with None: nothing happens. `req_id`, `fake`: for callers that pass them."""
        if block_indices is None:
            return
        lease = _lease(block_indices)
        with self._lock:
            self._leases.discard(lease)
        transfer, lease.transfer, lease.rows, lease.freed = lease.transfer, None, {}, True
        if transfer is not None:
            cancel(transfer)

    def set_buf(self, req: Any, *, content_id: bytes | None = None) -> None:
        """Embedding side: take the rows of `req` for its lease, `req.embedding_indices`. They are not copied where
        they have the layout's form, and must not change until the transfer ends.

        `req.embedding` [n, hidden]; `req.fill_ids`, n token numbers; `req.multimodal_inputs.mrope_positions` [3, n] and
        `mrope_position_delta`, one number; `req.deepstack_embeds` [n, layers, hidden] or [n, layers * hidden]. What is
        missing or None is absent. Called again while the encoder goes on, with all rows so far, it adds those that are
        new; fill_ids and mrope_positions may have the whole request's length from the start. Raises BadCall where there
        is no lease; tensors that do not fit make this request fail when it is sent, and disturb no other.
        """
        lease = _lease(getattr(req, "embedding_indices", None))
        if lease.freed:
            raise BadCall(f"the lease of {lease.req_id!r} has been freed")
        try:
            lease.rows, lease.mrope_delta = self._rows_of(req, lease.num_tokens)
            lease.content_id = None if content_id is None else sixteen_bytes(content_id, "content_id")
            lease.problem = None
        except FerryError as problem:
            lease.rows, lease.problem = {}, problem

    def get_buf(self, block_indices: Lease) -> tuple[torch.Tensor | None, ...]:
        """Language side: `(input_embeds [n, hidden], fill_ids [n], mrope_positions [3, n], aux_datas int64 [16])`, and
        `deepstack_embeds` [n, layers, hidden] fifth where the layout has it. None for what was not sent.

        All of a request's n tokens, however many rounds brought them. mrope_positions is a view: rows are stored
        token-major, SGLang's are [3, n]. A dummy rank's have no rows; its aux_datas are as everybody's. Raises the
        transfer's error, DeadlineExceeded before the end, and BadCall for a lease that no room was opened with.
        """
        lease = _lease(block_indices)
        transfer = lease.transfer
        if not isinstance(transfer, ReceiveTransfer):
            raise BadCall("nothing was received with this lease", hint="Give it to send_metadata first")
        result = transfer.result()
        found = {name: result[name] for name in result}
        positions = found.get("mrope_positions")
        buffers = (
            found.get("input_embeds"),
            found.get("fill_ids"),
            None if positions is None else positions.t(),
            torch.tensor(result.aux, dtype=torch.int64),
        )
        return (*buffers, found.get("deepstack_embeds")) if "deepstack_embeds" in self.layout else buffers

    def _rows_of(self, req: Any, whole: int) -> tuple[dict[str, torch.Tensor], int]:
        rows: dict[str, torch.Tensor] = {}
        embedding = getattr(req, "embedding", None)
        if not isinstance(embedding, torch.Tensor) or embedding.ndim != 2:
            raise BadTensor(f"embedding is a tensor [n, hidden], not {_told(embedding)}")
        n = len(embedding)
        rows["input_embeds"] = embedding.detach()
        if (ids := getattr(req, "fill_ids", None)) is not None:
            rows["fill_ids"] = _int32(ids, "fill_ids", (), n, whole)
        inputs = getattr(req, "multimodal_inputs", None)
        if (positions := getattr(inputs, "mrope_positions", None)) is not None:
            rows["mrope_positions"] = _int32(positions, "mrope_positions", (3,), n, whole).t().contiguous()
        if (deepstack := getattr(req, "deepstack_embeds", None)) is not None:
            if "deepstack_embeds" in self.layout and isinstance(deepstack, torch.Tensor) and deepstack.ndim == 2:
                layers, hidden = self.layout["deepstack_embeds"].shape
                if deepstack.shape[1] != layers * hidden:
                    raise BadTensor(f"deepstack_embeds is [n, {layers * hidden}], not {_told(deepstack)}")
                deepstack = deepstack.reshape(len(deepstack), layers, hidden)
            rows["deepstack_embeds"] = deepstack
        strange = [name for name in rows if name not in self.layout]
        if strange:
            raise BadTensor(f"the layout has no {', '.join(strange)}", hint="Declare it, or leave it off the request")
        delta = getattr(inputs, "mrope_position_delta", None)
        if isinstance(delta, torch.Tensor):
            if delta.numel() != 1:
                raise BadTensor(f"mrope_position_delta is one number, not {_told(delta)}")
            delta = delta.item()
        return rows, integer(0 if delta is None else delta, "mrope_position_delta", lowest=INT64, kind=BadTensor)


def _lease(given: object) -> Lease:
    if not isinstance(given, Lease):
        raise BadCall(
            f"what alloc gave is wanted here, not a {type(given).__name__}",
            hint="Blocks are the protocol's own: pass the lease on as it is",
        )
    return given


def cancel(transfer: SendTransfer | ReceiveTransfer) -> None:
    """End the room on both sides, if it has not ended; where that cannot be said any more, it is in the log."""
    try:
        transfer.cancel()
    except FerryError as problem:
        log.warning("room %d could not be cancelled: %s", transfer.room, problem)


def _int32(values: Any, what: str, before: tuple[int, ...], n: int, whole: int) -> torch.Tensor:
    """Integers `[*before, n]`; of `[*before, whole]`, a whole request's, the first n.

    SGLang has these as lists or as int64; they travel as int32, and a number that would wrap is refused."""
    try:
        tensor = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as problem:
        raise BadTensor(f"{what} are no numbers: {problem}") from None
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int32)  # an empty list is a tensor of floats
    if tensor.shape == (*before, whole) and n < whole:
        tensor = tensor[..., :n]
    shape = (*before, n)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.shape != shape:
        raise BadTensor(f"{what} are integers {list(shape)}, not {_told(tensor)}")
    if tensor.dtype != torch.int32:
        if tensor.numel() and not (INT32.min <= int(tensor.min()) and int(tensor.max()) <= INT32.max):
            raise BadTensor(f"{what} has numbers that do not fit into 32 bits")
        tensor = tensor.to(torch.int32)
    return tensor.contiguous()


def _told(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
