"""Packed weights: what is absorbed is what the packed layer applies."""

import pytest
import torch
from tiny import assert_close, decode, random_ids, reference_logits, tiny_model
from torch import nn

IDS = random_ids(2, 9)


class PackedLinear(nn.Linear):
    """Int8 codes under the name of the weight, as quantisers keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.scale = nn.Buffer(scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def unpacked(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.unpacked())


class FlattenedLinear(PackedLinear):
    """Takes what bitsandbytes' 8-bit layers take: contiguous rows, in two or three dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() not in (2, 3):
            raise ValueError(f"expected two or three dimensions, not {tuple(x.shape)}")
        return super().forward(x.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("packing", [PackedLinear, FlattenedLinear])
@pytest.mark.parametrize("route", ["auto", "absorbed", "expanded"])
def test_packed_projection(route, packing):
    model, plain = tiny_model(), tiny_model()
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        packed = packing(layer.self_attn.kv_b_proj)
        layer.self_attn.kv_b_proj = packed
        other.self_attn.kv_b_proj.weight.data = packed.unpacked()
    model.set_attention_route(route)
    expected = reference_logits(plain, IDS)
    assert_close(decode(model, IDS), expected)
    assert (expected - reference_logits(tiny_model(), IDS)).abs().max() > 1e-3, "packing must matter"


@pytest.mark.parametrize("route", ["auto", "absorbed"])
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao(route, bits):
    quantization = pytest.importorskip("torchao.quantization")
    if bits == 8:
        config = quantization.Int8WeightOnlyConfig()
    else:
        config = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    sizes = {"hidden_size": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    model = tiny_model(dtype=torch.float32, **sizes)
    plain = reference_logits(model, IDS)
    quantization.quantize_(model, config)
    assert type(model.model.layers[0].self_attn.kv_b_proj.weight) not in (torch.Tensor, nn.Parameter)
    model.set_attention_route("expanded")
    expected = decode(model, IDS)
    assert (expected - plain).abs().max() > 1e-2, "quantised"
    model.set_attention_route(route)
    assert_close(decode(model, IDS), expected, 1e-4)
