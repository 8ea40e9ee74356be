"""Pages of codes, for continuous batching: bytes in the pages, the first tokens of every sequence beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .coded_states_mla import LatentCodec
from .latent_code_mla import LatentCode


class PagedCodes:
    """What one layer needs besides the pages.

    A sequence's first tokens lie at the start of its first page, so those that are kept exact, never more than a page
    has, have their place by its block. What is read is decoded at once, for it is gathered at every step anyway.

    Args:
        allocator: Transformers', of the layer's pages.
    """

    def __init__(self, code: LatentCode, allocator: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.codec, self.allocator, self.dtype = LatentCodec(code, dtype, device), allocator, dtype
        self.nbytes = code.nbytes
        self.exact_tokens = 0 if allocator.layer_type != "full_attention" else code.exact_tokens
        # Slots count keys and values apart.
        blocks = -(-2 * len(allocator.cache_tensor) // allocator.block_physical_stride)
        # One token more than is kept: all others are written there.
        self.exact = torch.zeros(blocks, self.exact_tokens + 1, self.codec.width, dtype=dtype, device=device)

    def exchange(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        pages: Callable[[torch.Tensor, int, dict[str, Any]], torch.Tensor],
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Writes new tokens and reads all that they may attend to.

        Args:
            kv_c: ``[n, r]``, their latents.
            k_pe: ``[n, d_r]``, their rotary keys.
            pages: writes rows of the model's numbers and returns those that are to be read.
            layer_idx: the layer whose pages these are, for ``pages``.
            kwargs: the attention's, in which ``pages`` changes the bounds of the sequences.

        Returns:
            ``[1, 1, T, r + d_r]``.
        """
        rotated = self.codec.rotated(kv_c, k_pe)
        rows = self.codec.encode(rotated)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % self.dtype.itemsize))
        slots = self._first_slots(rotated, kwargs) if self.exact_tokens else None
        rows = pages(rows.view(self.dtype)[None, None], layer_idx, kwargs)
        states = self.codec.decode(rows[0, 0].contiguous().view(torch.uint8)[:, : self.nbytes])
        if slots is not None:
            blocks, places = slots
            exact = self.exact[blocks, places].to(states.dtype)
            states = torch.where((places < self.exact_tokens).unsqueeze(-1), exact, states)
        latent, rope = states.split(self.codec.widths, dim=-1)
        back = self.codec.latent.rotate_back(latent), self.codec.rope.rotate_back(rope)
        return torch.cat(back, dim=-1).to(self.dtype)[None, None]

    def _first_slots(self, rotated: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps what there is to keep of new tokens, ``rotated [n, r + d_r]``.

        Returns:
            Where each token that will be read is kept, ``[T]`` and ``[T]``: its block, and its place in the sequence,
            or `exact_tokens` from there on.
        """
        queries, keys = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][self.allocator.layer_type]
        written, read = (kwargs[name][self.allocator.index] for name in ("write_index", "read_index"))
        past = keys.diff() - queries.diff()
        places = _places_in_sequences(len(rotated), queries) + past[_sequences(len(rotated), queries)]
        blocks, places = written // self.allocator.block_physical_stride, places.clamp(0, self.exact_tokens)
        self.exact[blocks, places] = rotated.to(self.dtype)
        # Where nothing was cached before, the new tokens are all that is read.
        if not len(read):
            return blocks, places
        places = _places_in_sequences(len(read), keys).clamp(0, self.exact_tokens)
        return read // self.allocator.block_physical_stride, places

    def copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """As Transformers copies the pages of a sequence that is continued in several ways."""
        self.exact[targets] = self.exact[sources]


def _sequences(tokens: int, bounds: torch.Tensor) -> torch.Tensor:
    """``[tokens]``: which of the sequences between ``bounds`` each of so many packed tokens belongs to."""
    index = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:].contiguous(), index, right=True).clamp(max=len(bounds) - 2)


def _places_in_sequences(tokens: int, bounds: torch.Tensor) -> torch.Tensor:
    index = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    return index - bounds[_sequences(tokens, bounds)]
