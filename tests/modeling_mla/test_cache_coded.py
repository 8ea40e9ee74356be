"""Coded layers: every operation gives what it gives on a plain layer that holds the decoded values."""

import pytest
import torch
from test_cache_layers import OPERATIONS
from tiny import assert_close, decode, every_route, random_ids, reference_logits, tiny_config, tiny_model
from transformers.cache_utils import DynamicSlidingWindowLayer

from modeling_mla import LatentCache, StaticLatentCache
from modeling_mla.cache_coded_mla import CodedIndexedLatentLayer, CodedLatentLayer, CodedSlidingLatentLayer
from modeling_mla.cache_layers_mla import LatentLayer
from modeling_mla.coded_states_mla import LatentCodec
from modeling_mla.latent_code_mla import LatentCode, PartCode, uniform_code
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

RANK, ROPE, BATCH, EXACT = 7, 4, 3, 2
CODE = LatentCode(PartCode(((4, 4), (3, 3))), PartCode(((ROPE, 6),)), EXACT)
"""Not rotated: the product of a rotation is not the same to the bit for every number of tokens."""


def rows(tokens: int, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, tokens, RANK).to(dtype), torch.randn(batch, 1, tokens, ROPE).to(dtype)


def decoded(
    pair: tuple[torch.Tensor, torch.Tensor], first: int, exact_tokens: int = EXACT
) -> tuple[torch.Tensor, torch.Tensor]:
    """What tokens that come behind ``first`` others are cached as."""
    codec = LatentCodec(CODE, pair[0].dtype, pair[0].device)
    rotated = codec.rotated(pair[0][:, 0], pair[1][:, 0])
    exact = rotated[:, : max(exact_tokens - first, 0)]
    return tuple(states.decode() for states in codec.states(codec.encode(rotated), exact, (0,) * len(rotated)))


def assert_same(coded, plain) -> None:
    assert torch.equal(coded.keys, plain.keys)
    assert torch.equal(coded.values, plain.values)
    assert coded.get_seq_length() == plain.get_seq_length()
    assert coded.get_mask_sizes(3) == plain.get_mask_sizes(3)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [(5, 1, 1, 70, 1), (1, 1, 1, 4)])
def test_operations_equal_those_on_decoded_values(operation, dtype, chunks):
    coded, plain = CodedLatentLayer(CODE), LatentLayer()
    OPERATIONS[operation](coded)
    for tokens in chunks:
        new = rows(tokens, dtype=dtype)
        states = coded.update(*new)
        expected = plain.update(*decoded(new, plain.filled))
        for actual, wanted in zip(states, expected, strict=True):
            assert (actual.shape, actual.dtype, actual.device) == (wanted.shape, dtype, wanted.device)
            assert torch.equal(actual.decode(), wanted)
        for layer in (coded, plain):
            OPERATIONS[operation](layer)
        assert_same(coded, plain)


@pytest.mark.parametrize("window", [2, 3, 7, 20])
def test_sliding_layer_equals_the_stock_layer_on_decoded_values(window):
    coded, stock = CodedSlidingLatentLayer(CODE, sliding_window=window), DynamicSlidingWindowLayer(window)
    for step in range(40):
        new = rows((1, 3, 8)[step % 3])
        states = coded.update(*new)
        expected = stock.update(*decoded(new, 0, exact_tokens=0))
        for actual, wanted in zip(states, expected, strict=True):
            assert torch.equal(actual.decode(), wanted)
        assert_same(coded, stock)
        if step % 7 == 3:
            for layer in (coded, stock):
                layer.reorder_cache(torch.tensor([1, 0, 2]))
            assert_same(coded, stock)
    assert coded.buffer.shape[1] <= 4 * window + 144


def test_recorded_past_of_a_window_can_be_cropped():
    coded, stock = CodedSlidingLatentLayer(CODE, sliding_window=4), DynamicSlidingWindowLayer(4)
    for layer in (coded, stock):
        layer.activate_past_recording()
    for removed in (0, 3, 5, 1):
        new = rows(6)
        coded.update(*new)
        stock.update(*decoded(new, 0, exact_tokens=0))
        for layer in (coded, stock):
            layer.crop(-removed)
        assert_same(coded, stock)


def test_indexer_keys_follow_the_codes():
    coded = CodedIndexedLatentLayer(CODE)
    new = rows(6)
    coded.update(*new)
    keys = torch.randn(BATCH, 6, 5)
    coded.update_indexer(keys)
    before = coded.keys
    coded.reorder_cache(torch.tensor([2, 0, 0]))
    coded.crop(-2)
    assert torch.equal(coded.keys, before[[2, 0, 0], :, :4])
    assert torch.equal(coded.indexer_keys, keys[[2, 0, 0], :4])
    exact = BATCH * (EXACT + 1) * (RANK + ROPE) * 4
    assert coded.nbytes == coded.buffer.nbytes + exact + coded.indexer_keys.nbytes


def test_bytes_are_those_that_are_held():
    layer = CodedLatentLayer(CODE, capacity=50)
    assert layer.nbytes == 0
    layer.update(*rows(20, dtype=torch.bfloat16))
    # 4 channels of 4 bits, 3 of 3 in two planes, a scale; 4 of 6 bits in two planes, a scale.
    token = (2 + 2 + 1 + 1) + (2 + 2 + 1 + 1)
    assert CODE.nbytes == token
    assert layer.nbytes == BATCH * (50 * token + (EXACT + 1) * (RANK + ROPE) * 2)
    assert layer.nbytes == sum(t.untyped_storage().nbytes() for t in (layer.buffer, layer.first.rows))
    static = StaticLatentCache(tiny_config(), 32, latent_bits=4)
    static.early_initialization(2, 4, 20, torch.bfloat16, torch.device("cpu"))
    held = [
        layer.latents.untyped_storage().nbytes() + layer.first.rows.untyped_storage().nbytes()
        for layer in static.layers
    ]
    assert static.nbytes == sum(held) == 2 * 2 * (32 * uniform_code(4, 16, 4).nbytes + 5 * 20 * 2)


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (256, 32), (384, 32)])
def test_eight_bits_take_four_sevenths_of_bfloat16(rank, rope):
    assert 2 * (rank + rope) / uniform_code(8, rank, rope).nbytes >= 1.75


def test_a_code_of_other_widths_is_refused():
    with pytest.raises(ValueError, match="the latent segments have 7 channels; the layer caches 8"):
        CodedLatentLayer(CODE).update(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 4))


def test_an_unknown_number_of_bits_is_refused():
    with pytest.raises(ValueError, match=r"latent_bits is 7; known are 2, 3, 4, 5, 6, 8, 16"):
        LatentCache(tiny_config(), latent_bits=7)


@pytest.mark.parametrize("chunks", [[9], [4, 1, 1, 3], [1] * 9])
@torch.no_grad()
def test_static_layer_holds_what_the_growing_one_holds(chunks):
    config = tiny_config(latent_code=uniform_code(3, 16, 4).to_dict())
    growing, static = LatentCache(config), StaticLatentCache(config, 16)
    for tokens in chunks:
        new = torch.randn(2, 1, tokens, 16), torch.randn(2, 1, tokens, 4)
        for cache in (growing, static):
            cache.update(*new, 0)
    own, other = growing.layers[0], static.layers[0]
    assert_close(other.keys[:, :, :9], own.keys, 1e-6)
    assert_close(other.values[:, :, :9], own.values, 1e-6)
    assert not other.keys[:, :, 9:].any()
    for cache in (growing, static):
        cache.layers[0].reorder_cache(torch.tensor([1, 1]))
    assert_close(other.keys[:, :, :9], own.keys, 1e-6)
    addresses = [tensor.data_ptr() for tensor in (other.latents, other.first.rows)]
    static.reset()
    assert not other.latents.any()
    assert not other.first.rows.any()
    static.update(*new, 0)
    assert addresses == [tensor.data_ptr() for tensor in (other.latents, other.first.rows)]


class Rounding(LatentCache):
    """An uncoded cache of what a coded one decodes to."""

    def __init__(self, config, bits: int) -> None:
        super().__init__(config)
        self.coded = LatentCache(config, latent_bits=bits)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = [part.decode() for part in self.coded.update(key_states, value_states, layer_idx)]
        new = key_states.shape[2]
        return super().update(*(part[:, :, -new:] for part in states), layer_idx)


@every_route
@pytest.mark.parametrize("bits", [8, 4, 2])
@torch.no_grad()
def test_decode_equals_an_uncoded_cache_of_the_same_values(route, bits):
    model = tiny_model()
    model.set_attention_route(route)
    ids = random_ids(2, 40)
    actual = decode(model, ids, 20, LatentCache(model.config, latent_bits=bits))
    expected = decode(model, ids, 20, Rounding(model.config, bits))
    assert_close(actual, expected)
    error = (actual - reference_logits(model, ids)).abs().max() / actual.std()
    assert error > 1e-6, "it is coded"
    assert error < {8: 0.1, 4: 1.0, 2: 4.0}[bits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decode_in_other_precisions(dtype):
    model = tiny_model(dtype=dtype)
    ids = random_ids(1, 40)
    actual = decode(model, ids, 20, LatentCache(model.config, latent_bits=6))
    expected = decode(model, ids, 20, Rounding(model.config, 6))
    assert_close(actual, expected, {torch.float32: 1e-3, torch.bfloat16: 0.15}[dtype])


def test_gradients_pass_the_code_as_if_there_were_none():
    model, ids, gradients = tiny_model(), random_ids(2, 9), []
    for code, kind in ((None, LatentLayer), (uniform_code(8, 16, 4).to_dict(), CodedLatentLayer)):
        model.config.latent_code = code
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        assert type(cache_of(output).layers[0]) is kind
        gradients.append(model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad.clone())
    assert 0 < (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


@torch.no_grad()
def test_the_configuration_decides_unless_told_otherwise():
    model = tiny_model(latent_code=[uniform_code(4, 16, 4).to_dict(), None])
    ids = random_ids(1, 6)
    kinds = [type(layer) for layer in cache_of(model(ids)).layers]
    assert kinds == [CodedLatentLayer, LatentLayer]
    assert {type(layer) for layer in LatentCache(model.config, latent_bits=16).layers} == {LatentLayer}
    uncoded = model(ids, **cache_argument(LatentCache(model.config, latent_bits=16))).logits
    assert_close(uncoded, reference_logits(model, ids))


def test_every_kind_of_layer_is_coded():
    config = tiny_config(layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    kinds = [type(layer) for layer in LatentCache(config, latent_bits=4).layers]
    assert kinds == [CodedLatentLayer, CodedSlidingLatentLayer]
