"""Layers of the latent cache whose rows are codes of a few bits, for every kind of layer that grows."""

from __future__ import annotations

import torch
from transformers.utils import logging
from typing_extensions import override

from .cache_file_mla import SavedLayer
from .cache_indexed_mla import IndexedLatentLayer
from .cache_layers_mla import LatentLayer, SlidingLatentLayer
from .coded_layer_mla import CodedLayer, empty_rows
from .coded_states_mla import CodedStates, LatentCodec
from .first_tokens_mla import FirstTokens
from .latent_code_mla import LatentCode, code_for

logger = logging.get_logger(__name__)


class CodedLatentLayer(CodedLayer, LatentLayer):
    """A `LatentLayer` whose buffer holds bytes, ``[B, capacity, code.nbytes]`` uint8.

    Rows are coded once, when they are appended. `update` returns `CodedStates`, which are decoded where they are read.
    Where a gradient is wanted `update` returns tensors, and the gradient passes the
    code unchanged to the tokens of that call.

    Args:
        code: of the rows, or the bits of a uniform one.
    """

    def __init__(self, code: LatentCode | int, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.wanted = code

    @override
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv_lora_rank = key_states.shape[-1]
        self.code = code_for(self.wanted, self.kv_lora_rank, value_states.shape[-1])
        self.codec = LatentCodec(self.code, self.dtype, self.device)
        batch = key_states.shape[0]
        self.buffer = empty_rows(batch, self.capacity, self.code, self.device)
        self.first = FirstTokens(self.exact_tokens, batch, self.codec.width, self.dtype, self.device)
        self.is_initialized = True

    @property
    def exact_tokens(self) -> int:
        """First tokens that are kept besides their codes."""
        return self.code.exact_tokens

    @property
    @override
    def nbytes(self) -> int:
        """Bytes that the rows occupy, free capacity included, with the first tokens."""
        if not self.is_initialized:
            return 0
        aligning = self.buffer.untyped_storage().nbytes() - self.buffer.nbytes
        return super().nbytes + aligning + self.first.rows.nbytes

    @override
    def _empty(self, rows: torch.Tensor, capacity: int) -> torch.Tensor:
        return empty_rows(len(rows), capacity, self.code, rows.device)

    @property
    @override
    def coded_rows(self) -> torch.Tensor:
        return self.stored

    @override
    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[CodedStates, CodedStates]:
        """As `LatentLayer.update`; what it returns stands for what the cache holds, the new tokens included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_tokens = key_states.shape[-2]
        with torch.no_grad():
            rotated = self.codec.rotated(key_states[:, 0], value_states[:, 0])
            self._make_room(new_tokens)
            self._skip_padding()
            self._write(rotated, self.buffer, None, self.filled)
        self._count(new_tokens)
        states = self._states(self._visible())
        if torch.is_grad_enabled() and key_states.requires_grad:
            logger.warning_once(
                "A coded cache passes gradients to the tokens of one call alone; to train through several, make the "
                "cache with latent_bits=16."
            )
            return _with_gradient(states[0], key_states), _with_gradient(states[1], value_states)
        return states

    def _skip_padding(self) -> None:
        if self.padding is not None and self.exact_tokens:
            self.first.skip_padding(self.padding, self.filled)
        self.padding = None

    @override
    def saved(self) -> SavedLayer:
        if any(self.first.starts):
            raise ValueError(
                "This cache holds sequences that are padded on the left, and a file says nothing of padding; save a "
                "cache of sequences of one length."
            )
        exact = self.first.rows[:, : min(self.first.count, self.filled)]
        return SavedLayer(self.stored, self.kv_lora_rank, self.code, exact)

    @override
    def restore(self, saved: SavedLayer, dtype: torch.dtype) -> None:
        assert saved.exact is not None
        assert saved.code is not None
        super().restore(saved, dtype)
        self.code = saved.code
        self.codec = LatentCodec(self.code, dtype, self.device)
        self.first = FirstTokens(self.exact_tokens, len(saved.rows), self.codec.width, dtype, self.device)
        self.first.rows[:, : saved.exact.shape[1]] = saved.exact

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.filled:
            self._align()
            self.first.repeat(repeats)

    @override
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.filled:
            self._align()
            self.first.select(indices)

    def _align(self) -> None:
        if self.device.type != "cpu":
            self._move(self.buffer, self.filled)


def _with_gradient(states: CodedStates, new: torch.Tensor) -> torch.Tensor:
    """What is cached, with the gradient that it has if the tokens ``new [B, 1, n, d]`` are cached as they are.

    This is the straight-through gradient (Bengio, Leonard and Courville, arXiv 1308.3432).
    """
    cached = states.decode()
    past, own = cached.split([cached.shape[2] - new.shape[2], new.shape[2]], dim=2)
    return torch.cat((past, new + (own - new).detach()), dim=2)


class CodedSlidingLatentLayer(CodedLatentLayer, SlidingLatentLayer):
    """A `SlidingLatentLayer` of codes. The first tokens leave its window, so it keeps none of them exact."""

    @property
    @override
    def exact_tokens(self) -> int:
        return 0


class CodedIndexedLatentLayer(CodedLatentLayer, IndexedLatentLayer):
    """An `IndexedLatentLayer` of codes; the indexer keys are stored as they are."""
