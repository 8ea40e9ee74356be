"""Frequencies of every rope type, and rotation in both layouts."""

import pytest
import torch
from tiny import assert_close, tiny_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from modeling_mla.rope_mla import MLARotaryEmbedding, apply_rotary, layer_angles

DIM = 8
ROPE_PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}


def tables(rope_parameters: dict) -> tuple[MLARotaryEmbedding, LlamaRotaryEmbedding]:
    own = tiny_config(qk_rope_head_dim=DIM, rope_parameters=dict(rope_parameters), max_position_embeddings=64)
    body = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        head_dim=DIM,
        rope_parameters=dict(rope_parameters),
        max_position_embeddings=64,
    )
    return MLARotaryEmbedding(own), LlamaRotaryEmbedding(body)


@pytest.mark.parametrize("rope_type", ROPE_PARAMETERS)
def test_every_rope_type_equals_the_body_over_the_rotary_channels(rope_type):
    own, body = tables(ROPE_PARAMETERS[rope_type])
    x = torch.zeros(1, 1, dtype=torch.float64)
    # Short, beyond the trained length, beyond the maximum, short again: two of the types adapt to the length.
    for last in (10, 40, 100, 12):
        positions = torch.arange(last + 1)[None]
        cos, sin = (angle[:, :, 0] for angle in own(x, positions))
        body_cos, body_sin = body(x, positions)
        assert torch.equal(torch.cat((cos, cos), -1), body_cos), last
        assert torch.equal(torch.cat((sin, sin), -1), body_sin), last


def test_rope_types_differ_from_the_default():
    positions, x = torch.arange(100)[None], torch.zeros(1, 1)
    default = tables(ROPE_PARAMETERS["default"] | {"rope_theta": 1e4})[0](x, positions)[0]
    for rope_type in set(ROPE_PARAMETERS) - {"default"}:
        scaled = tables(ROPE_PARAMETERS[rope_type] | {"rope_theta": 1e4})[0](x, positions)[0]
        assert (scaled - default).abs().max() > 1e-2, rope_type


def test_explicit_rows_win_over_rope_parameters():
    config = tiny_config(
        rope_inv_freq=[[0.5, 0.25], [0.125]],
        qk_rope_head_dims=[4, 2],
        rope_attention_factor=1.5,
        rope_parameters=ROPE_PARAMETERS["linear"],
    )
    angles = MLARotaryEmbedding(config)(torch.zeros(1, 1), torch.tensor([[3, 8]]))
    cos, sin = layer_angles(angles, 0, 4, 4)
    expected = torch.tensor([[1.5, 0.75], [4.0, 2.0]])
    torch.testing.assert_close(cos[0], 1.5 * expected.cos())
    torch.testing.assert_close(sin[0], 1.5 * expected.sin())
    cos, sin = layer_angles(angles, 1, 2, 4)
    torch.testing.assert_close(cos[0], 1.5 * torch.tensor([[0.375], [1.0]]).cos())
    torch.testing.assert_close(sin[0], 1.5 * torch.tensor([[0.375], [1.0]]).sin())


def test_explicit_frequencies_keep_their_float32_bits_in_any_dtype():
    rows = torch.rand(1, 2).tolist()
    table = MLARotaryEmbedding(tiny_config(rope_inv_freq=rows))
    assert torch.equal(table.inv_freq, torch.tensor(rows))
    assert table(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[1]]))[0].dtype == torch.bfloat16


def test_long_positions_do_not_lose_the_angle():
    """Angles are float32 even where the model is bfloat16: position 100000 is no bfloat16 number."""
    table = MLARotaryEmbedding(tiny_config(rope_inv_freq=[[1.0, 1e-4]]))
    x = torch.zeros(1, dtype=torch.bfloat16)
    even, odd = (table(x, torch.tensor([[position]]))[0][0, 0, 0, 0] for position in (100000, 100001))
    assert even != odd


@pytest.mark.parametrize("interleave", [False, True])
def test_rotation_is_a_complex_product(interleave):
    x = torch.randn(2, 3, 5, DIM, dtype=torch.float64)
    angles = torch.rand(2, 5, DIM // 2, dtype=torch.float64)
    actual = apply_rotary(x, angles.cos(), angles.sin(), interleave)
    real, imaginary = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    expected = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert_close(actual, torch.cat((expected.real, expected.imag), dim=-1), 1e-12)


def test_rotation_equals_the_body():
    x = torch.randn(2, 3, 5, DIM)
    cos, sin = torch.rand(2, 5, DIM // 2), torch.rand(2, 5, DIM // 2)
    expected, _ = apply_rotary_pos_emb(x, x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    torch.testing.assert_close(apply_rotary(x, cos, sin, interleave=False), expected, rtol=0, atol=1e-6)


def test_explicit_frequencies_change_where_those_of_the_body_do():
    """The same table, stored as the body's two sets of frequencies."""
    parameters = ROPE_PARAMETERS["longrope"]
    _, body = tables(parameters)
    short = body.inv_freq.clone()
    body(torch.zeros(1), torch.tensor([[99]]))
    assert not torch.equal(body.inv_freq, short)
    config = tiny_config(
        qk_rope_head_dim=DIM,
        rope_parameters=dict(parameters),
        rope_inv_freq=[short.tolist()],
        rope_long_inv_freq=[body.inv_freq.tolist()],
        rope_attention_factor=body.attention_scaling,
    )
    own = MLARotaryEmbedding(config)
    x = torch.zeros(1, 1, dtype=torch.float64)
    for last in (10, 15, 16, 40, 12):
        positions = torch.arange(last + 1)[None]
        for mine, theirs in zip(own(x, positions), body(x, positions), strict=True):
            assert_close(mine[:, :, 0], theirs[..., : DIM // 2], 0.0)
