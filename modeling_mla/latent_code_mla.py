"""How a latent and its rotary key are kept in few bits: the description that a configuration carries.

A value is ``scale * (level - middle)``: the level an integer of as many bits as its channel has, the scale one number
for a token, or for a group of a token's channels. What prepares a latent for few bits (mean, scale, rotation) is folded
into the weights by whoever made the checkpoint; where it cannot be, because a norm or RoPE stands between, the code
says ``rotated``, and a fixed orthogonal matrix is applied when a token is cached.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bit_packing_mla import packed_bytes

EXACT = 16
"""Bits of what is not coded: bfloat16, or float16 in a float16 model."""
BITS = (2, 3, 4, 5, 6, 8, EXACT)
_SCALE_BYTES = 2
_SCALE_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_EXACT_TOKENS = 4
"""Attention sinks stand at the first few tokens, with latents many times larger than all others."""


def middle(bits: int) -> float:
    """Half of the largest level, so that values lie on both sides of zero alike.

    Levels of 8 bits are signed and have none: half a step matters little there, and would not fit into bfloat16.
    """
    return 0.0 if bits == 8 else (2**bits - 1) / 2


def largest(bits: int) -> float:
    """The largest absolute value of ``level - middle``."""
    return 127.0 if bits == 8 else middle(bits)


@dataclass(frozen=True)
class PartCode:
    """The code of latents or of rotary keys.

    Args:
        segments: ``(channels, bits)`` in the order of the channels; bits are of `BITS`. 16 stands alone.
        group: channels of a segment that share a scale; None is one scale a token.
        rotated: the fixed orthogonal matrix of `hartley_mla` is applied before coding.
    """

    segments: tuple[tuple[int, int], ...]
    group: int | None = None
    rotated: bool = False

    def __post_init__(self) -> None:
        for channels, bits in self.segments:
            if type(channels) is not int or channels < 1:
                raise ValueError(f"a segment has {channels!r} channels; it must have at least 1.")
            if type(bits) is not int or bits not in BITS:
                raise ValueError(f"a segment has {bits!r} bits; known are {', '.join(map(str, BITS))}.")
        if any(bits == EXACT for _, bits in self.segments) and (len(self.segments) > 1 or self.rotated):
            raise ValueError(f"segments are {list(self.segments)}; 16 bits must be the only segment, and not rotated.")
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise ValueError(f"group is {self.group!r}; it must be at least 1, or None for one scale a token.")
        if type(self.rotated) is not bool:
            raise ValueError(f"rotated is {self.rotated!r}; it must be true or false.")

    @functools.cached_property
    def channels(self) -> int:
        """Channels of all segments."""
        return sum(channels for channels, _ in self.segments)

    @functools.cached_property
    def is_exact(self) -> bool:
        """Whether states are kept in 16 bits, or there are none."""
        return not self.segments or self.segments[0][1] == EXACT

    @functools.cached_property
    def groups(self) -> tuple[int, ...]:
        """The channels that each scale is for, in their order."""
        if self.is_exact:
            return ()
        if self.group is None:
            return (self.channels,)
        sizes: list[int] = []
        for channels, _ in self.segments:
            whole, rest = divmod(channels, self.group)
            sizes += [self.group] * whole + [rest] * (rest > 0)
        return tuple(sizes)

    @property
    def scale_shares(self) -> tuple[float, ...]:
        """Of the largest state of a group, what its scale may be made for; that of the least squared error is taken.

        With few levels a smaller scale rounds most states better than the few that it cuts off lose. With 8 bits none
        does.
        """
        return (1.0,) if any(bits == 8 for _, bits in self.segments) else _SCALE_SHARES

    @functools.cached_property
    def scale_bytes(self) -> int:
        """Bytes of a token's scales, which are bfloat16 and lie before its levels."""
        return _SCALE_BYTES * len(self.groups)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of a token, scales included: even, so that scales can be read where they lie."""
        if self.is_exact:
            return 2 * self.channels
        fields = sum(packed_bytes(channels, bits) for channels, bits in self.segments)
        return self.scale_bytes + fields + fields % 2

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``, within what `LatentCode.to_dict` gives."""
        return {"segments": [list(segment) for segment in self.segments], "group": self.group, "rotated": self.rotated}


def code_numbers(code: PartCode) -> list[int]:
    """A part's segments as an operator of PyTorch takes them; `part_code` reads them."""
    return [number for segment in code.segments for number in segment]


def part_code(numbers: Sequence[int]) -> PartCode:
    """The inverse of `code_numbers`, of a part with one scale a token; whether it is rotated is not kept."""
    return _part_code(tuple(numbers))


@functools.cache
def _part_code(numbers: tuple[int, ...]) -> PartCode:
    return PartCode(tuple(zip(numbers[::2], numbers[1::2], strict=True)))


@dataclass(frozen=True)
class LatentCode:
    """The code of one layer's cache.

    Args:
        latent: of the latents.
        rope: of the rotary keys; without segments where there are none.
        exact_tokens: tokens at the start of a sequence that are kept in the model's precision besides. Sliding-window
            layers, which the start leaves, keep none.
    """

    latent: PartCode
    rope: PartCode
    exact_tokens: int = _EXACT_TOKENS

    def __post_init__(self) -> None:
        if type(self.exact_tokens) is not int or self.exact_tokens < 0:
            raise ValueError(f"exact_tokens is {self.exact_tokens!r}; it must be a number, at least 0.")
        if not self.latent.segments:
            raise ValueError("latent has no segments; it must have one for every channel of the latent.")

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of a token behind the exact ones."""
        return self.latent.nbytes + self.rope.nbytes

    def check_widths(self, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
        """Raises `ValueError` where the code is for other widths."""
        for name, part, width in (("latent", self.latent, kv_lora_rank), ("rope", self.rope, qk_rope_head_dim)):
            if part.channels != width:
                raise ValueError(f"the {name} segments have {part.channels} channels; the layer caches {width}.")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``; `from_dict` reads it."""
        return {"latent": self.latent.to_dict(), "rope": self.rope.to_dict(), "exact_tokens": self.exact_tokens}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> LatentCode:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: a field is missing, unknown or out of its range.
        """
        _check_fields("latent_code", written, {"latent", "rope"}, {"exact_tokens"})
        parts = {}
        for name in ("latent", "rope"):
            part = written[name]
            _check_fields(f"latent_code.{name}", part, {"segments"}, {"group", "rotated"})
            segments = part["segments"]
            if not isinstance(segments, list | tuple) or not all(
                isinstance(segment, list | tuple) and len(segment) == 2 for segment in segments
            ):
                raise ValueError(f"latent_code.{name}.segments is {segments!r}; it must list [channels, bits] pairs.")
            parts[name] = PartCode(
                tuple((channels, bits) for channels, bits in segments), part.get("group"), part.get("rotated", False)
            )
        return cls(**parts, exact_tokens=written.get("exact_tokens", _EXACT_TOKENS))


def _check_fields(name: str, written: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(written, Mapping):
        raise ValueError(f"{name} is {written!r}; it must be a mapping.")
    if not required <= written.keys() <= required | optional:
        raise ValueError(
            f"{name} has the fields {', '.join(map(str, written))}; it must have {', '.join(sorted(required))} and may "
            f"have {', '.join(sorted(optional))}."
        )


def code_for(code: LatentCode | int, kv_lora_rank: int, qk_rope_head_dim: int) -> LatentCode:
    """The code for a layer of these widths: ``code`` itself, or `uniform_code` of so many bits.

    Raises:
        ValueError: the code is for other widths.
    """
    if isinstance(code, int):
        return uniform_code(code, kv_lora_rank, qk_rope_head_dim)
    code.check_widths(kv_lora_rank, qk_rope_head_dim)
    return code


def check_latent_bits(bits: int | None) -> None:
    """Raises `ValueError` where a cache cannot be asked for so many bits."""
    if bits is not None and bits not in BITS:
        raise ValueError(f"latent_bits is {bits!r}; known are {', '.join(map(str, BITS))} (16: not coded), or None.")


def uniform_code(bits: int, kv_lora_rank: int, qk_rope_head_dim: int) -> LatentCode:
    """The code for latents that nothing has prepared: rotated, and one scale a token.

    The rotary key is more sensitive (coded-latents measurements of this project, and SnapMLA, arXiv 2602.10718): it
    has 6 bits beside latents of up to 4, 8 beside 5 and 6, and bfloat16 beside 8.
    """
    rope_bits = 6 if bits <= 4 else 8 if bits <= 6 else EXACT
    rope = ((qk_rope_head_dim, rope_bits),) if qk_rope_head_dim else ()
    return LatentCode(
        PartCode(((kv_lora_rank, bits),), rotated=True), PartCode(rope, rotated=bool(rope) and rope_bits != EXACT)
    )
