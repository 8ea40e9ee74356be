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
        """Writes new tokens, ``[n, r]`` and ``[n, d_r]``, and reads all that they may attend to.

        Args:
            pages: writes rows of the model's numbers and returns those that are to be read.
            kwargs: the attention's, in which ``pages`` changes the bounds of the sequences.

        Returns:
            ``[1, 1, T, r + d_r]``.
        """
        rotated = self.codec.rotated(kv_c, k_pe)
        queries, keys = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][self.allocator.layer_type]
        written, read = (kwargs[name][self.allocator.index] for name in ("write_index", "read_index"))
        past = keys.diff() - queries.diff()
        places = _places_in_sequences(len(rotated), queries) + past[_sequences(len(rotated), queries)]
        self.exact[self._block(written), self._kept(places)] = rotated.to(self.dtype)

        rows = self.codec.encode(rotated)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % self.dtype.itemsize))
        rows = pages(rows.view(self.dtype)[None, None], layer_idx, kwargs)
        states = self.codec.decode(rows[0, 0].contiguous().view(torch.uint8)[:, : self.nbytes])
        # Where nothing was cached before the new tokens are all.
        places = _places_in_sequences(len(states), keys) if len(read) else places
        exact = self.exact[self._block(read if len(read) else written), self._kept(places)].to(states.dtype)
        states = torch.where((places < self.exact_tokens).unsqueeze(-1), exact, states)
        latent, rope = states.split(self.codec.widths, dim=-1)
        back = self.codec.latent.rotate_back(latent), self.codec.rope.rotate_back(rope)
        return torch.cat(back, dim=-1).to(self.dtype)[None, None]

    def copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """As Transformers copies the pages of a sequence that is continued in several ways."""
        self.exact[targets] = self.exact[sources]

    def _block(self, slots: torch.Tensor) -> torch.Tensor:
        return slots // self.allocator.block_physical_stride

    def _kept(self, places: torch.Tensor) -> torch.Tensor:
        return places.clamp(0, self.exact_tokens)


def _sequences(tokens: int, bounds: torch.Tensor) -> torch.Tensor:
    """``[tokens]``: which of the sequences between ``bounds`` each of so many packed tokens belongs to."""
    index = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:].contiguous(), index, right=True).clamp(max=len(bounds) - 2)


def _places_in_sequences(tokens: int, bounds: torch.Tensor) -> torch.Tensor:
    index = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    return index - bounds[_sequences(tokens, bounds)]
