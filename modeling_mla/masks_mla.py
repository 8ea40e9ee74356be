"""Which keys a query sees, from every form of mask that Transformers makes for its attention functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.weak import WeakTensorKeyDictionary


class RowBounds(NamedTuple):
    """What kernels take in the place of a mask: the keys of every sequence are one run.

    Query i of n stands at key ``ends - n + i`` of its sequence. It sees the keys from ``starts`` on, up to its own
    where attention is ``causal``, else up to ``ends``; and of these the last ``window``.

    Attributes:
        starts: ``[B]`` int32.
        ends: ``[B]`` int32.
        causal: False for one query, which stands at the end.
        window: None where it hides nothing, as for one query, whose window is in ``starts``.
        from_zero: every run is known to start at key 0.
        to_last: every run is known to end at the last key.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    causal: bool
    window: int | None
    from_zero: bool
    to_last: bool


_FOUND: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What was found in a mask, for the layers that share it."""


class VisibleKeys(NamedTuple):
    """A mask that is made only where it is needed.

    Args:
        attention_mask: 4-D bool (SDPA) or additive (eager), a `BlockMask` (flex), 2-D padding (flash), or None.
        query_length: n, the queries.
        kv_length: S, the keys.
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

    @property
    def hides_keys(self) -> bool:
        """Whether any query may not see all keys in use."""
        return self.attention_mask is not None or self.first_query is not None

    @property
    def first_query(self) -> int | None:
        """The key at which the first query stands, where what a query may see follows from its place.

        None where nothing does: in 4-D masks the order is held already, and one query at the end sees all before it.
        """
        if not self.is_causal or self._is_whole(self.attention_mask):
            return None
        if self.query_length == 1 and (self.window is None or self.kv_length <= self.window):
            return None
        return self.kv_length - self.query_length if self.aligned_to_end else 0

    @property
    def window(self) -> int | None:
        """The sliding window, where it is in no mask."""
        return self.sliding_window if self.aligned_to_end and not self._is_whole(self.attention_mask) else None

    def bounds(self, batch: int) -> RowBounds | None:
        """The mask as runs of keys; None where it is not made of runs.

        Masks are looked at, once for all layers that share one, at the price of one synchronisation with the device:
        within a compiled or captured graph there is none, and masks have no bounds.
        """
        mask, length = self.attention_mask, self.keys_in_use
        if mask is None:
            start = max(length - self.window, 0) if self.window is not None and self.query_length == 1 else 0
            starts, ends = (torch.full((batch,), at, dtype=torch.int32, device=self.device) for at in (start, length))
            causal = self.first_query is not None and self.query_length > 1
            return RowBounds(starts, ends, causal, self.window if causal else None, start == 0, True)
        if isinstance(mask, BlockMask) or mask.is_floating_point() or in_graph(mask):
            return None
        if mask.is_inference():
            # Nothing tells whether it was written to since.
            return _runs(self.dense(), batch, self.sliding_window)
        facts = (batch, self.query_length, length, self.sliding_window, self.aligned_to_end, mask._version)
        known, found = _FOUND.get(mask, (None, None))
        if known != facts:
            found = _runs(self.dense(), batch, self.sliding_window)
            _FOUND[mask] = (facts, found)
        return found

    @staticmethod
    def _is_whole(mask: torch.Tensor | BlockMask | None) -> bool:
        return isinstance(mask, BlockMask) or (mask is not None and mask.dim() == 4)

    def given(self) -> torch.Tensor | None:
        """What was given over the keys in use, without what follows from `first_query` and `window`.

        Returns:
            4-D, broadcastable to ``[B, H, n, S]``, bool (True attends) or additive; None where nothing was.
        """
        return self._given_block(slice(0, self.query_length), slice(0, self.keys_in_use))

    def dense(self) -> torch.Tensor | None:
        """The whole mask over the keys in use, as `block` gives it of a part."""
        return self.block(slice(0, self.query_length), slice(0, self.keys_in_use))

    def block(self, rows: slice, keys: slice) -> torch.Tensor | None:
        """The mask between some queries and some keys.

        Returns:
            Broadcastable to ``[B, H, rows, keys]``, bool (True attends) or additive; None where all is visible.
        """
        given, placed = self._given_block(rows, keys), self._placed_block(rows, keys)
        if given is None or placed is None:
            return placed if given is None else given
        return given & placed

    def _given_block(self, rows: slice, keys: slice) -> torch.Tensor | None:
        mask = self.attention_mask
        if isinstance(mask, BlockMask):
            batch, heads = mask.shape[:2]
            whole = create_mask(mask.mask_mod, batch, heads, self.query_length, self.kv_length, device=str(self.device))
            return whole[:, :, rows, keys]
        if mask is not None and mask.dim() == 4:
            return mask[..., rows, keys] if mask.shape[-2] > 1 else mask[..., keys]
        return None if mask is None else mask[:, None, None, keys].bool()

    def _placed_block(self, rows: slice, keys: slice) -> torch.Tensor | None:
        first, window = self.first_query, self.window
        if first is None:
            return None
        positions = torch.arange(rows.start + first, rows.stop + first, device=self.device)
        distance = positions[:, None] - torch.arange(keys.start, keys.stop, device=self.device)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return visible[None, None]


def in_graph(tensor: torch.Tensor) -> bool:
    """Whether a call with a tensor of any shape becomes part of a graph, for which Python may read no values."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _runs(dense: torch.Tensor | None, batch: int, window: int | None) -> RowBounds | None:
    """The bounds of a mask ``[B or 1, H or 1, n, S]``, None where it has none that hold for all heads."""
    if dense is None or dense.shape[1] != 1:
        return None
    seen = dense[:, 0].expand(batch, -1, -1)
    queries, keys = seen.shape[1:]
    key = torch.arange(keys, device=seen.device)
    any_query = seen.any(1).int()
    starts, ends = any_query.argmax(-1), keys - any_query.flip(-1).argmax(-1)
    within = ((key >= starts[:, None]) & (key < ends[:, None]))[:, None]
    place = (ends - queries)[:, None] + torch.arange(queries, device=seen.device)
    up_to = within & (key <= place[..., None])
    forms = [within, up_to] if queries > 1 else [within]
    if queries > 1 and window is not None:
        forms.append(up_to & (key > place[..., None] - window))
    same = [(seen == form).all() for form in forms]
    from_zero, to_last, *fits = torch.stack([(starts == 0).all(), (ends == keys).all(), *same]).tolist()
    if True not in fits:
        return None
    form = fits.index(True)
    return RowBounds(starts.int(), ends.int(), form > 0, window if form == 2 else None, from_zero, to_last)
