"""Codes of few bits: the description, the bits, and values against a form written for single numbers."""

import math
import struct

import numpy as np
import pytest
import torch

from modeling_mla import LlamaMLAConfig
from modeling_mla.bit_packing_mla import packed_bytes, unpack_levels
from modeling_mla.code_writer_mla import RowWriter
from modeling_mla.coded_states_mla import Codec, LatentCodec
from modeling_mla.hartley_mla import hartley_matrix
from modeling_mla.latent_code_mla import LatentCode, PartCode, uniform_code

CPU = torch.device("cpu")
CODES = {
    "8": PartCode(((13, 8),)),
    "6": PartCode(((64, 6),)),
    "5": PartCode(((21, 5),)),
    "4": PartCode(((144, 4),)),
    "3": PartCode(((10, 3),)),
    "2": PartCode(((9, 2),)),
    "segments": PartCode(((16, 8), (5, 6), (7, 5), (12, 4), (3, 3), (1, 2))),
    "groups": PartCode(((20, 4), (11, 3)), group=8),
    "one channel": PartCode(((1, 4),)),
}


def ceil_bfloat16(value: float) -> float:
    """The least bfloat16 that is not below a number, by its bits."""
    (bits,) = struct.unpack(">I", struct.pack(">f", value))
    kept = bits & 0xFFFF0000
    (result,) = struct.unpack(">f", struct.pack(">I", kept if kept == bits else kept + 0x10000))
    return result


def rounded_by(step: float, state: float, bits: int) -> float:
    """The nearest value of a channel at a step."""
    top, half = (127.0, 0.0) if bits == 8 else ((2**bits - 1) / 2, 0.5)
    level = 0.0 if step == 0 else math.floor(state / step + (0.5 - half)) + half
    return step * min(max(level, -top), top)


SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the largest state, what a scale may be made for."""


def oracle(state: list[float], code: PartCode, shares: tuple[float, ...] = SHARES) -> tuple[list[float], list[float]]:
    """What a vector is decoded to, and the step of each channel, number by number in float64."""
    channels = [bits for count, bits in code.segments for _ in range(count)]
    places = [index for count, _ in code.segments for index in range(count)]
    owner, group = [], -1
    for channel, place in enumerate(places):
        starts = channel == 0 if code.group is None else place % code.group == 0
        group += starts
        owner.append(group)
    values, steps = [0.0] * len(channels), [0.0] * len(channels)
    for one in range(group + 1):
        fellows = [i for i in range(len(channels)) if owner[i] == one]
        tops = {i: 127.0 if channels[i] == 8 else (2 ** channels[i] - 1) / 2 for i in fellows}
        largest = max(float(np.float32(abs(state[i]) / tops[i])) for i in fellows)
        # Some states may be cut off where that rounds the others better.
        found = []
        for share in (1.0,) if 8 in channels else shares:
            step = ceil_bfloat16(float(np.float32(largest) * np.float32(share)))
            rounded = [rounded_by(step, state[i], channels[i]) for i in fellows]
            found.append(
                (sum((state[i] - value) ** 2 for i, value in zip(fellows, rounded, strict=True)), step, rounded)
            )
        _, step, rounded = min(found, key=lambda candidate: candidate[0])
        for i, value in zip(fellows, rounded, strict=True):
            values[i], steps[i] = value, step
    return values, steps


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_values_are_those_of_the_oracle(name, magnitude):
    code = CODES[name]
    states = magnitude * torch.randn(40, code.channels, generator=torch.Generator().manual_seed(code.channels)).double()
    codec = Codec(code, torch.float64, CPU)
    rows = codec.encode(states)
    assert (rows.shape, rows.dtype) == ((40, code.nbytes), torch.uint8)
    decoded = codec.decode(rows)
    expected, steps = (torch.tensor(part) for part in zip(*(oracle(s, code) for s in states.tolist()), strict=True))
    expected, steps = expected.double(), steps.double()
    # Between two levels float32 may fall to either side.
    tied = ((states - expected).abs() / steps - 0.5).abs() < 1e-4
    assert tied.double().mean() < 0.05
    torch.testing.assert_close(decoded[~tied], expected[~tied], rtol=1e-12, atol=0.0)
    unclipped, steps = (
        torch.tensor(part).double() for part in zip(*(oracle(s, code, (1.0,)) for s in states.tolist()), strict=True)
    )
    assert ((unclipped - states).abs() <= 0.5001 * steps).all(), "the largest scale cuts off no value"
    lost, least = ((values - states).square().sum(-1) for values in (unclipped, decoded))
    assert (least <= lost * (1 + 1e-6)).all(), "a value is cut off only where that rounds the others better"
    assert (least < 0.95 * lost).any() == (code.channels > 1 and all(bits < 5 for _, bits in code.segments))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_parts_side_by_side_are_coded_as_each_alone(bits):
    codec = LatentCodec(LatentCode(PartCode(((32, bits),)), PartCode(((16, bits),))), torch.float32, CPU)
    rotated = torch.randn(64, 48, generator=torch.Generator().manual_seed(bits))
    latent, rope = rotated.split([32, 16], dim=-1)
    alone = torch.cat((codec.latent.encode(latent), codec.rope.encode(rope)), dim=-1)
    assert torch.equal(codec.encode(rotated), alone)


@pytest.mark.parametrize("name", CODES)
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(name):
    codec = Codec(CODES[name], torch.float32, CPU)
    assert not codec.decode(codec.encode(torch.zeros(2, codec.code.channels))).any()
    for value in (math.nan, math.inf):
        states = torch.ones(1, codec.code.channels)
        states[0, -1] = value
        assert not codec.decode(codec.encode(states))[0, -1].isfinite()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("channels", [1, 3, 8, 48, 144, 513])
def test_levels_survive_their_bytes(bits, channels):
    code, levels = PartCode(((channels, bits),)), torch.randint(0, 2**bits, (10, channels), dtype=torch.uint8)
    scales = torch.zeros(10, code.scale_bytes, dtype=torch.uint8)
    rows = RowWriter([code], CPU).packing.rows(torch.cat((scales, levels), -1))
    assert rows.shape == (10, code.nbytes)
    packed = rows[:, code.scale_bytes :][:, : packed_bytes(channels, bits)].view(2, 5, -1)
    levels = levels.view(2, 5, channels)
    if channels % 8 == 0:
        assert packed.shape[-1] == channels * bits // 8
    assert packed.shape[-1] - channels * bits / 8 < bits
    wide = torch.zeros(2, 5, packed.shape[-1] + 3, dtype=torch.uint8)
    wide[..., 2:-1] = packed
    unpacked = torch.full((2, 5, channels + 4), 99, dtype=torch.uint8)
    unpack_levels(wide[..., 2:-1], bits, unpacked[..., 1 : channels + 1])
    assert torch.equal(unpacked[..., 1 : channels + 1], levels)
    assert (unpacked[..., [0, -1]] == 99).all(), "nothing is written beside them"


@pytest.mark.parametrize("size", [1, 2, 6, 48, 64, 144])
def test_rotation_is_orthogonal_and_flat(size):
    matrix = hartley_matrix(size, torch.float64, CPU)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0.0, atol=1e-12)
    assert matrix.abs().max() <= math.sqrt(2 / size) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rotated_states_come_back(dtype, bits):
    code = uniform_code(bits, 48, 8)
    codec = LatentCodec(code, dtype, CPU)
    kv_c, k_pe = torch.randn(2, 7, 48).to(dtype), torch.randn(2, 7, 8).to(dtype)
    rotated = codec.rotated(kv_c, k_pe)
    for states, given, few in zip(
        codec.states(codec.encode(rotated), rotated[:, :2].to(dtype), (0, 0)), (kv_c, k_pe), (bits, 6), strict=True
    ):
        decoded = states.decode()
        assert (decoded.shape, decoded.dtype, states.shape) == (given[:, None].shape, dtype, decoded.shape)
        error = (decoded[:, 0].double() - given.double()).abs()
        exact = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
        assert error[:, :2].max() < exact, "first tokens are kept"
        assert error[:, 2:].mean() < {2: 0.6, 4: 0.15, 6: 0.05, 8: 0.02}[few] + exact
        cut = states.narrow(2, 1, 4)
        torch.testing.assert_close(cut.decode(), decoded[:, :, 1:5], rtol=0.0, atol=exact)


def test_sixteen_bits_are_kept_in_sixteen():
    states = torch.randn(3, 6)
    for dtype, kept in ((torch.float32, torch.bfloat16), (torch.float16, torch.float16)):
        codec = Codec(PartCode(((6, 16),)), dtype, CPU)
        rows = codec.encode(states.to(dtype))
        assert rows.shape == (3, 12)
        assert torch.equal(codec.decode(rows), states.to(dtype).to(kept).float())


def test_bytes_of_a_token():
    code = LatentCode.from_dict({"latent": {"segments": [[144, 4]]}, "rope": {"segments": [[48, 6]], "rotated": True}})
    assert code.nbytes == 144 // 2 + 2 + 48 * 6 // 8 + 2
    assert code.exact_tokens == 4
    grouped = PartCode(((64, 3), (80, 2)), group=64)
    assert grouped.groups == (64, 64, 16)
    assert grouped.nbytes == 3 * 2 + 24 + 20
    assert PartCode(((5, 4),)).nbytes == 2 + 3 + 1, "rows begin at even bytes"
    assert uniform_code(4, 512, 64).nbytes == 308
    assert uniform_code(8, 512, 64).nbytes == 512 + 2 + 128


def test_the_description_survives_json_and_the_configuration():
    codes = [uniform_code(4, 16, 4).to_dict(), None]
    config = LlamaMLAConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=8,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        latent_code=codes,
    )
    again = LlamaMLAConfig.from_dict(config.to_dict())
    assert again.latent_code == codes
    assert again.layer_latent_code(0) == uniform_code(4, 16, 4)
    assert again.layer_latent_code(1) is None
    # The second layer is not coded.
    assert again.cache_bytes_per_token(torch.bfloat16) == uniform_code(4, 16, 4).nbytes + 2 * 20


RIGHT = {"latent": {"segments": [[16, 4]]}, "rope": {"segments": [[4, 6]]}}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ({"latent": {"segments": [[16, 4]]}}, "latent_code has the fields latent; it must have latent, rope"),
        (RIGHT | {"bits": 3}, "has the fields latent, rope, bits"),
        (RIGHT | {"latent": {"segments": [[16, 7]]}}, r"a segment has 7 bits; known are 2, 3, 4, 5, 6, 8, 16"),
        (RIGHT | {"latent": {"segments": [[0, 4]]}}, "a segment has 0 channels"),
        (RIGHT | {"latent": {"segments": 16}}, r"segments is 16; it must list \[channels, bits\] pairs"),
        (RIGHT | {"latent": {"segments": []}}, "latent has no segments"),
        (RIGHT | {"latent": {"segments": [[8, 16], [8, 4]]}}, "16 bits must be the only segment"),
        (RIGHT | {"latent": {"segments": [[16, 4]], "group": 0}}, "group is 0; it must be at least 1"),
        (RIGHT | {"rope": {"segments": [[4, 6]], "rotated": 1}}, "rotated is 1"),
        (RIGHT | {"exact_tokens": -1}, "exact_tokens is -1"),
        (RIGHT | {"latent": {"segments": [[8, 4]]}}, "latent segments have 8 channels; the layer caches 16"),
        ([RIGHT], "latent_code has 1 entries for 2 layers"),
        ([RIGHT, 3], "latent_code of layer 1: latent_code is 3; it must be a mapping"),
    ],
)
def test_a_wrong_description_is_refused(code, message):
    with pytest.raises(Exception, match=message):
        LlamaMLAConfig(
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_size=8,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            latent_code=code,
        )
