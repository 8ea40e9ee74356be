"""Coded latents for kernels, and what attention over what they decode to must give."""

from __future__ import annotations

import math

import torch
from decode_cases import FREE_ROWS, TOLERANCES, Case, expected, random_tensors, visible_keys

from modeling_mla.coded_layer_mla import empty_rows
from modeling_mla.coded_states_mla import LatentCodec
from modeling_mla.latent_code_mla import LatentCode, PartCode, code_numbers, uniform_code
from modeling_mla.latent_tiles_mla import CodedLatents

ROPE = PartCode(((8, 6),))
CODES = {
    "4 bits": uniform_code(4, 32, 8),
    "8 bits": uniform_code(8, 32, 8),
    "segments": LatentCode(PartCode(((16, 6), (9, 5), (4, 8), (3, 2))), ROPE, exact_tokens=0),
    "two segments": LatentCode(PartCode(((20, 5), (12, 3))), ROPE, exact_tokens=20),
    "groups": LatentCode(PartCode(((20, 4), (12, 3)), group=8), PartCode(((8, 5),), group=3)),
    "latents in 16": LatentCode(PartCode(((32, 16),)), ROPE),
}


def coded(
    code: LatentCode, latents: torch.Tensor, starts: tuple[int, ...] | None = None, aligned: bool = False
) -> CodedLatents:
    """``latents [B, S, r + d_r]`` as a cache holds them: rows of a larger buffer.

    ``starts`` are the places of the first of every sequence's exact tokens.
    """
    batch, length, _ = latents.shape
    codec = LatentCodec(code, latents.dtype, latents.device)
    rotated = codec.rotated(*latents.split(codec.widths, dim=-1))
    rows = codec.encode(rotated)
    # A cache on an accelerator aligns its rows, whose layout is all that a device decides.
    place = torch.device("meta") if aligned else torch.device("cpu")
    like = empty_rows(batch, length + FREE_ROWS, code, place)
    room = torch.full((like.untyped_storage().nbytes(),), 255, dtype=torch.uint8, device=latents.device)
    buffer = room.as_strided(like.shape, like.stride(), like.storage_offset())
    buffer[:, :length] = rows
    starts = starts or (0,) * batch
    exact = torch.zeros(batch, code.exact_tokens, latents.shape[2], dtype=latents.dtype, device=latents.device)
    for index, start in enumerate(starts):
        first = rotated[index, start : start + code.exact_tokens].to(latents.dtype)
        exact[index, : len(first)] = first
    return CodedLatents(*codec.states(buffer[:, :length], exact, starts))


def decoded(held: CodedLatents, latents: torch.Tensor) -> torch.Tensor:
    """What the codes stand for, with the exact tokens as they were."""
    states = torch.cat([part.codec.rotate_back(part.codec.decode(part.rows)) for part in held], dim=-1)
    count = held.latent.exact.shape[1]
    for index, start in enumerate(held.latent.starts):
        states[index, start : start + count] = latents[index, start : start + count].to(states.dtype)
    return states


def check(
    case: Case,
    code: LatentCode,
    attend,
    device: torch.device,
    starts: tuple[int, ...] | None = None,
    aligned: bool = False,
    seed: int = 0,
) -> None:
    """Compares ``attend`` (`AbsorbedBackend.attend`) with the reference over the same dequantised values."""
    torch.manual_seed(seed)
    query, latents = random_tensors(case, device)
    visible, bias = visible_keys(case, device)
    scale = 2 / math.sqrt(case.rank + case.rope)
    held = coded(code, latents, starts, aligned)
    with torch.no_grad():
        context, lse = attend(held.rotated_query(query), held, case.rank, scale, visible, case.softcap)
    context = held.context(context)
    assert context.dtype == case.dtype
    wanted, wanted_lse = expected(case, query, decoded(held, latents), scale, bias)
    context, lse = context.double().cpu(), lse.double().cpu()
    error = (context - wanted).norm() / wanted.norm().clamp(min=1e-30)
    # The query is rounded once more behind its rotation.
    assert error <= 2 * TOLERANCES[case.dtype], f"{case}: {error:.2g}"
    tolerance = 1e-4 if case.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-3, atol=tolerance)


def check_append(code: LatentCode, dtype: torch.dtype, device: torch.device, positions: tuple[int, ...] | None) -> None:
    """Compares the kernel that codes new tokens with the codec, byte for byte, and asserts that it writes nothing else.

    Five tokens of two sequences, one of them zeros, are written at ``positions``, or from the third place on.
    """
    from modeling_mla.triton_append_mla import append_codes

    torch.manual_seed(0)
    codec, kept = LatentCodec(code, dtype, device), 4
    states = torch.randn(2, 5, codec.width, dtype=dtype, device=device)
    states[1, 3] = 0
    rotated = codec.rotated(*states.split(codec.widths, dim=-1))
    places = torch.tensor(positions or range(3, 8), device=device)
    starts = torch.tensor([0, 2], device=device)
    wanted = torch.full((2, 12, code.nbytes), 0, dtype=torch.uint8, device=device)
    wanted[:, places] = codec.encode(rotated)
    wanted_exact = torch.zeros(2, kept + 1, codec.width, dtype=dtype, device=device)
    for index, start in enumerate(starts.tolist()):
        for token, place in enumerate(places.tolist()):
            if 0 <= place - start < kept:
                wanted_exact[index, place - start] = rotated[index, token].to(dtype)
    rows, exact = torch.zeros_like(wanted), torch.zeros_like(wanted_exact)
    numbers = code_numbers(code.latent), code_numbers(code.rope)
    append_codes(rotated, rows, exact, starts, None if positions is None else places, 3, kept, *numbers)
    assert torch.equal(rows, wanted)
    # The interpreter rounds to bfloat16 by cutting off.
    tolerance = 2**-7 if device.type == "cpu" and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(exact, wanted_exact, rtol=tolerance, atol=0)
