"""The KV cache: preallocated slots, raw keys, one rotation per round, attention over slots.

Executes what context.py decides; knows nothing of rounds or words. A token's states are written
once and never move. Keys are kept unrotated; the rotated keys that attention reads are made
from them whenever positions change, so that nothing is ever rotated twice.
"""
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.nn import functional

NAME = 'svlm_slots'     # of the attention function in transformers' registry


@dataclass(frozen=True)
class RotaryRule:
    """M-RoPE of one model.

    :param inverse_frequencies: float32 [head_dim / 2].
    :param axes: int64 [head_dim / 2], which of t, h, w turns each frequency.
    :param scaling: factor on cosines and sines (1 for plain RoPE).
    """

    inverse_frequencies: torch.Tensor
    axes: torch.Tensor
    scaling: float

    def angles(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, float32 [tokens, head_dim], of positions [3, tokens]."""
        device = self.inverse_frequencies.device
        places = torch.from_numpy(positions).to(device)[self.axes].T     # [tokens, head_dim / 2]
        half = places * self.inverse_frequencies
        full = torch.cat([half, half], dim=-1)
        return full.cos() * self.scaling, full.sin() * self.scaling


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate keys or queries [..., tokens, head_dim]; in float32, returned in their own type."""
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos + turned * sin).to(states.dtype)


class KVCache:
    """Slots of one stream, for all layers. Allocated once; zeros, so that unused slots are finite.

    :param layers, kv_heads, head_dim: of the text model.
    :param slots: tokens it can hold, scratch slots included.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, slots: int, rule: RotaryRule,
                 dtype: torch.dtype, device: torch.device) -> None:
        shape = (layers, kv_heads, slots, head_dim)
        self.raw_keys = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)      # rotated
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.rule = rule
        self._places = np.full((3, slots), np.nan, np.float32)     # where `keys` are rotated to

    @property
    def bytes(self) -> int:
        """Memory taken."""
        return sum(t.numel() * t.element_size() for t in (self.raw_keys, self.keys, self.values))

    def place(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """Rotate the keys in `slots` [tokens] to `positions` [3, tokens], in every layer.

        Slots whose position did not change are left alone.
        """
        moved = np.any(self._places[:, slots] != positions, axis=0)
        if not moved.any():
            return
        slots, positions = slots[moved], positions[:, moved]
        self._places[:, slots] = positions
        cos, sin = self.rule.angles(positions)
        index = torch.from_numpy(slots).to(self.keys.device)
        for raw, keys in zip(self.raw_keys, self.keys, strict=True):
            keys[:, index] = rotate(raw[:, index], cos, sin)

    def begin(self, slots: np.ndarray, positions: np.ndarray, mask: np.ndarray,
              first: int, end: int) -> 'Step':
        """Prepare a forward pass that writes new tokens and attends to what `mask` allows.

        :param slots: int64 [tokens], where the new tokens' states go.
        :param positions: float32 [3, tokens].
        :param mask: bool [tokens, end - first], the slots in [first, end) that each token sees,
            itself included.
        """
        self._places[:, slots] = positions
        cos, sin = self.rule.angles(positions)
        device = self.keys.device
        return Step(self, torch.from_numpy(slots).to(device), cos, sin,
                    torch.from_numpy(mask).to(device), first, end)


@dataclass(frozen=True)
class Step:
    """One forward pass over new tokens: where they go, how they turn, what they see."""

    cache: KVCache
    slots: torch.Tensor     # [tokens]
    cos: torch.Tensor       # [tokens, head_dim]
    sin: torch.Tensor       # [tokens, head_dim]
    mask: torch.Tensor      # [tokens, end - first]
    first: int
    end: int


def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           attention_mask: None, *,  # noqa: ARG001  transformers passes it; ours is in `step`
           step: Step, scaling: float,
           **_: object) -> tuple[torch.Tensor, None]:
    """Write the new tokens' states, then attend over the cache: transformers' attention function.

    :param query: unrotated, [1, heads, tokens, head_dim]; `key`, `value` have kv_heads.
    :return: [1, tokens, heads, head_dim].
    """
    cache, layer = step.cache, cast(int, module.layer_idx)
    cache.raw_keys[layer][:, step.slots] = key[0]
    cache.keys[layer][:, step.slots] = rotate(key[0], step.cos, step.sin)
    cache.values[layer][:, step.slots] = value[0]
    keys = cache.keys[layer][:, step.first:step.end]        # [kv_heads, slots, head_dim]
    values = cache.values[layer][:, step.first:step.end]
    kv_heads, head_dim = keys.shape[0], keys.shape[2]
    tokens = query.shape[2]
    # Grouped queries: heads of one group share keys; nothing is repeated in memory.
    queries = rotate(query[0], step.cos, step.sin).view(kv_heads, -1, tokens, head_dim)
    shape = (kv_heads, queries.shape[1], *keys.shape[1:])
    mixed = functional.scaled_dot_product_attention(
        queries, keys[:, None].expand(shape), values[:, None].expand(shape),
        attn_mask=step.mask, scale=scaling)
    return mixed.reshape(1, -1, tokens, head_dim).transpose(1, 2), None
