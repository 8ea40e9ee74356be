"""The first tokens of every sequence, kept as they are beside their codes.

Attention sinks stand there, with latents many times larger than all others. Where sequences are padded on the left they
do not begin where the cache does, and each has its own start.
"""

from __future__ import annotations

from typing import Any

import torch

from .masks_mla import in_graph


class FirstTokens:
    """Rows for the first tokens of a batch, of one layer.

    Args:
        count: tokens of a sequence that are kept.
        batch: B, sequences.
        width: r + d_r.

    Attributes:
        rows: ``[B, count + 1, r + d_r]``, rotated; all other tokens are written to the last one.
        starts: where in the cache each sequence begins; known to Python, for reading cuts rows by them.
        places: the same ``[B]`` int64 on the device, where kernels read them.
    """

    def __init__(self, count: int, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count = count
        self.rows = torch.zeros(batch, count + 1, width, dtype=dtype, device=device)
        self.start_at((0,) * batch)

    def start_at(self, starts: tuple[int, ...]) -> None:
        """Sets ``starts``, on the device as well: writing must copy nothing to it."""
        self.starts = starts
        self.places = torch.tensor(starts, dtype=torch.long, device=self.rows.device)

    @property
    def end(self) -> int:
        """The place in the cache from which no token is kept."""
        return self.count + max(self.starts, default=0)

    def skip_padding(self, padding: tuple[int, ...], filled: int) -> None:
        """Takes notice of so many padded tokens before every sequence, where ``filled`` tokens end before it.

        A sequence of one token counts as none: by the positions, the last padded token looks like one.
        """
        pairs = zip(self.starts, padding, strict=True)
        self.start_at(tuple(found if start >= filled - 1 else start for start, found in pairs))

    def write(self, rotated: torch.Tensor, places: torch.Tensor) -> None:
        """Keeps what there is to keep of new tokens ``[B, n, r + d_r]``, which are cached at ``places [n]``."""
        slots = places - self.places.unsqueeze(-1)
        slots = slots.where((slots >= 0) & (slots < self.count), self.count)
        self.rows.scatter_(1, slots.unsqueeze(-1).expand_as(rotated), rotated.to(self.rows.dtype))

    def repeat(self, repeats: int) -> None:
        """Puts ``repeats`` of every sequence side by side."""
        self.rows = self.rows.repeat_interleave(repeats, dim=0)
        self.start_at(tuple(start for start in self.starts for _ in range(repeats)))

    def select(self, indices: torch.Tensor) -> None:
        """Keeps the sequences at ``indices [n]``, in their order there."""
        self.rows = self.rows[indices.to(self.rows.device)]
        self.select_starts(indices)

    def select_starts(self, indices: torch.Tensor) -> None:
        """As `select`, of rows that are selected already."""
        if any(self.starts):
            self.start_at(tuple(self.starts[index] for index in indices.tolist()))
        elif len(indices) != len(self.starts):
            self.start_at((0,) * len(indices))


def leading_padding(
    arguments: dict[str, Any], input_shape: torch.Size, filled: int | torch.Tensor
) -> tuple[int, ...] | None:
    """Padded tokens before every sequence of a prompt, from what a model is called with.

    Args:
        arguments: ``attention_mask [B, S]``, or a mask of another form beside ``position_ids [B, n]``, as `generate`
            makes them: the last token's position then tells how many there are.
        input_shape: ``[B, n]``.
        filled: tokens that are cached already.

    Returns:
        None where nothing is told, for single tokens, and within a graph, which must not wait for the device.
    """
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if input_shape[1] == 1 or any(isinstance(told, torch.Tensor) and in_graph(told) for told in (mask, positions)):
        return None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        found = (mask.cumsum(-1) == 0).sum(-1)
    elif mask is not None and isinstance(positions, torch.Tensor) and positions.shape == input_shape:
        found = (filled + input_shape[1] - 1 - positions[:, -1]).clamp(min=0)
    else:
        return None
    return tuple(found.tolist())
