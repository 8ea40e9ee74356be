"""Which keys a query sees, from every form of mask that Transformers makes for its attention functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask


@dataclass(frozen=True)
class VisibleKeys:
    """A mask that is made only where it is needed.

    Args:
        attention_mask: 4-D bool (SDPA) or additive (eager), a `BlockMask` (flex), 2-D padding (flash), or None.
        query_length, kv_length: n and S.
        device: where to make a mask.
        is_causal: False where attention is bidirectional.
        sliding_window: keys that a query sees, itself included; already in every mask but flash's.
        aligned_to_end: the last query is at the last key (flash), not the first at the first.
    """

    attention_mask: torch.Tensor | BlockMask | None
    query_length: int
    kv_length: int
    device: torch.device
    is_causal: bool = True
    sliding_window: int | None = None
    aligned_to_end: bool = False

    @property
    def keys_in_use(self) -> int:
        """Keys from the start beyond which no query sees any.

        A causal mask is left out only where queries and keys start together: what follows is a static cache that is
        not filled yet.
        """
        starts_together = self.attention_mask is None and self.is_causal and not self.aligned_to_end
        return self.query_length if starts_together and self.query_length > 1 else self.kv_length

    def dense(self) -> torch.Tensor | None:
        """The whole mask over the keys in use."""
        return self.block(slice(0, self.query_length), slice(0, self.keys_in_use))

    def block(self, rows: slice, keys: slice) -> torch.Tensor | None:
        """The mask between some queries and some keys.

        Returns:
            Broadcastable to ``[B, H, rows, keys]``, bool (True attends) or additive; None where all is visible.
        """
        mask = self.attention_mask
        if isinstance(mask, BlockMask):
            batch, heads = mask.shape[:2]
            whole = create_mask(mask.mask_mod, batch, heads, self.query_length, self.kv_length, device=str(self.device))
            return whole[:, :, rows, keys]
        if mask is not None and mask.dim() == 4:
            return mask[..., rows, keys] if mask.shape[-2] > 1 else mask[..., keys]
        causal = self._causal_block(rows, keys)
        if mask is None:
            return causal
        padding = mask[:, None, None, keys].bool()
        return padding if causal is None else causal & padding

    def _causal_block(self, rows: slice, keys: slice) -> torch.Tensor | None:
        window = self.sliding_window if self.aligned_to_end else None
        if not self.is_causal or (self.query_length == 1 and (window is None or self.kv_length <= window)):
            return None
        first = self.kv_length - self.query_length if self.aligned_to_end else 0
        positions = torch.arange(rows.start + first, rows.stop + first, device=self.device)
        distance = positions[:, None] - torch.arange(keys.start, keys.stop, device=self.device)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return visible[None, None]
