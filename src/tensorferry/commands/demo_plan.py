"""What one run of the demo moves: worked out once, and given to every process as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_TOKENS = 50_000
"""Six times the default pool: the first grant carries a sixth of it."""

SYNTHETIC_HIDDEN_SIZE = 3584
"""The language model of the running example, Qwen2.5-VL-7B."""

SYNTHETIC_DTYPE = "bfloat16"

TEXT_HIDDEN_SIZE = 384
"""all-MiniLM-L6-v2's."""

TEXT_DTYPE = "float32"
"""all-MiniLM-L6-v2's weights are float32, so that is what its embedding layer gives."""

TEXT_WINDOW = 512
"""all-MiniLM-L6-v2 numbers positions from 0 to 511: longer text is cut into windows of this many tokens."""


@dataclass(frozen=True)
class Plan:
    """`source` is "text" or "synthetic"; `settings` are all of Settings, which both sides take as arguments."""

    source: str
    tokens: int
    hidden_size: int
    dtype: str
    rooms: int
    ranks: int
    seed: int
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
