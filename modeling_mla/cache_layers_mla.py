"""Layers of the latent cache that grow: full attention and sliding window, one contiguous buffer each."""

from __future__ import annotations

import torch
from typing_extensions import override

from .cache_file_mla import SavedLayer
from .transformers_seams_mla import DynamicLayer

_ALIGNMENT = 64
"""Capacities are multiples of this: the page size of the decode kernels."""
_GROWTH = 1.25
"""Appending copies ``1 / (_GROWTH - 1)`` rows a token on average and wastes at most a quarter of the data."""


class LatentLayer(DynamicLayer):
    """The cache of one layer: ``buffer [B, capacity, kv_lora_rank + qk_rope_head_dim]``, filled up to ``filled``.

    ``keys`` and ``values`` are views of it, the latents ``[B, 1, S, kv_lora_rank]`` and the rotary keys
    ``[B, 1, S, qk_rope_head_dim]``: the 4-D pair that Transformers' cache code, beams and assistants expect.
    Appending costs O(1) amortised, where `DynamicLayer` copies the whole cache for every token.

    Args:
        capacity: tokens to allocate at once where the final length is known; the buffer then never moves.
    """

    supports_early_init = False  # the first tokens tell the widths; Transformers would pass those of expanded keys
    buffer: torch.Tensor

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity or 0
        self.filled = 0
        self.kv_lora_rank = 0
        self.is_initialized = False

    @property
    def visible(self) -> torch.Tensor | None:
        """``[B, S, kv_lora_rank + qk_rope_head_dim]``: what the last `update` returned, as one view."""
        return self._visible()

    def _visible(self) -> torch.Tensor:
        return self.buffer.narrow(1, 0, self.filled)

    @property
    def stored(self) -> torch.Tensor:
        """The rows that the next token still needs."""
        return self.buffer[:, : self.filled]

    @property
    @override
    def keys(self) -> torch.Tensor | None:
        return self.stored[..., : self.kv_lora_rank].unsqueeze(1) if self.is_initialized else None

    @property
    @override
    def values(self) -> torch.Tensor | None:
        return self.stored[..., self.kv_lora_rank :].unsqueeze(1) if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer occupies, free capacity included."""
        return self.buffer.nbytes if self.is_initialized else 0

    @override
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv_lora_rank = key_states.shape[-1]
        width = self.kv_lora_rank + value_states.shape[-1]
        # Zeros, not what the memory held: products with unfilled rows must stay finite, and exports compare buffers.
        self.buffer = key_states.new_zeros(key_states.shape[0], self.capacity, width)
        self.is_initialized = True

    def _make_room(self, new_tokens: int) -> None:
        """Ensures that ``new_tokens`` rows are free behind the filled ones."""
        needed = self.filled + new_tokens
        if needed > self.buffer.shape[1]:
            self._move(self.buffer[:, : self.filled], needed)

    def _move(self, rows: torch.Tensor, needed: int) -> None:
        wanted = max(needed, int(rows.shape[1] * _GROWTH))
        capacity = -(-wanted // _ALIGNMENT) * _ALIGNMENT
        grown = self._empty(rows, capacity)
        grown[:, : rows.shape[1]] = rows
        self.buffer = grown

    def _empty(self, rows: torch.Tensor, capacity: int) -> torch.Tensor:
        """Zeros for so many tokens of the sequences of ``rows``."""
        return rows.new_zeros(rows.shape[0], capacity, rows.shape[2])

    @override
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``[B, 1, n, kv_lora_rank]`` latents and ``[B, 1, n, qk_rope_head_dim]`` rotary keys.

        Returns:
            All that the new tokens may attend to, of both, as views of the buffer.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_tokens = key_states.shape[-2]
        learns = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if self.buffer.requires_grad or learns:
            # A backward pass through several chunks needs the rows as each chunk read them.
            rows = torch.cat((key_states, value_states), dim=-1)[:, 0]
            self.buffer = torch.cat((self.buffer[:, : self.filled], rows), dim=1)
        else:
            self._make_room(new_tokens)
            rows = self.buffer.narrow(1, self.filled, new_tokens).unsqueeze(1)
            torch.cat((key_states, value_states), dim=-1, out=rows)
        self._count(new_tokens)
        return self._halves(self._visible())

    def _halves(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rank = self.kv_lora_rank
        kv_c, k_pe = latents.unsqueeze(1).split_with_sizes((rank, latents.shape[-1] - rank), dim=-1)
        return kv_c, k_pe

    def _count(self, new_tokens: int) -> None:
        self.filled += new_tokens

    @override
    def get_seq_length(self) -> int:
        return self.filled

    def saved(self) -> SavedLayer:
        """What the next tokens need, for a file."""
        return SavedLayer(self.stored, self.kv_lora_rank)

    def restore(self, saved: SavedLayer, dtype: torch.dtype) -> None:
        """Makes the layer hold what another of its kind had `saved`, in a model of ``dtype``."""
        self.dtype, self.device, self.kv_lora_rank = dtype, saved.rows.device, saved.kv_lora_rank
        self.buffer, self.filled = saved.rows, saved.rows.shape[1]
        self.is_initialized = True

    @override
    def offload(self) -> None:
        if self.is_initialized:
            self.buffer = self.buffer.to("cpu", non_blocking=True)

    @override
    def prefetch(self) -> None:
        if self.is_initialized and self.buffer.device != self.device:
            self.buffer = self.buffer.to(self.device, non_blocking=True)

    @override
    def reset(self) -> None:
        """Forgets the tokens and frees the buffer, as the next sequences may be another batch."""
        if self.is_initialized:
            del self.buffer
        self.filled = 0
        self.is_initialized = False

    @override
    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens (not positive, as Transformers passes it)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): the number must not be positive; pass -n to remove the last n tokens."
            )
        self.filled = max(self.filled + tokens_to_remove, 0)

    @override
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.filled:
            self.buffer = self.buffer[:, : self.filled].repeat_interleave(repeats, dim=0)

    @override
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.filled:
            self.buffer = self.buffer[:, : self.filled][indices.to(self.buffer.device)]


class SlidingLatentLayer(LatentLayer):
    """The cache of a sliding-window layer: the last ``sliding_window - 1`` tokens and those being processed.

    The window slides inside the buffer and moves to its front when the end is reached, so that a token costs O(1)
    amortised; behaviour and mask sizes are those of `DynamicSlidingWindowLayer`.

    Args:
        sliding_window: keys that a query sees, itself included.
    """

    is_sliding = True

    def __init__(self, sliding_window: int) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False
        self._last_new = 0
        self._disposable = 0

    def activate_past_recording(self) -> None:
        """Keeps all rows until the next `crop`, so that an assistant's tokens can be taken back."""
        self.record_past = True

    @override
    def _visible(self) -> torch.Tensor:
        first = max(self.filled - self._last_new - self.sliding_window + 1, 0)
        return self.buffer[:, first : self.filled]

    @property
    @override
    def stored(self) -> torch.Tensor:
        first = self._disposable if self.record_past else self._outside_window()
        return self.buffer[:, first : self.filled]

    def _outside_window(self) -> int:
        return max(self.filled - self.sliding_window + 1, 0)

    @override
    def _make_room(self, new_tokens: int) -> None:
        needed = self.filled + new_tokens
        if needed <= self.buffer.shape[1]:
            return
        rows = self.stored
        kept = rows.shape[1]
        if kept + new_tokens <= self.buffer.shape[1] and 2 * kept <= self.filled:
            self.buffer[:, :kept] = rows
        else:
            # Twice the window, so that a move pays for as many tokens as it copies.
            self._move(rows, max(kept + new_tokens, 2 * min(kept, self.sliding_window)))
        self.filled, self._disposable = kept, 0

    @override
    def _count(self, new_tokens: int) -> None:
        super()._count(new_tokens)
        self.cumulative_length += new_tokens
        self._last_new = new_tokens

    @override
    def get_seq_length(self) -> int:
        return self.cumulative_length

    @override
    def get_max_length(self) -> int:
        return self.sliding_window

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.cumulative_length, self.sliding_window - 1)
        return past + query_length, self.cumulative_length - past

    @override
    def reset(self) -> None:
        super().reset()
        self.cumulative_length = self._last_new = self._disposable = 0

    @override
    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                f"crop({tokens_to_remove}) after {self.cumulative_length} tokens: tokens before the window of "
                f"{self.sliding_window} are gone; call activate_past_recording() before the tokens to be cropped."
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = max(self.cumulative_length + tokens_to_remove, 0)
        self._disposable = self._outside_window()
