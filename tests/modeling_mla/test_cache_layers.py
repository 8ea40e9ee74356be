"""Layers that grow: contents, views, growth, and everything that Transformers does to them."""

import random

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from modeling_mla.cache_layers_mla import LatentLayer, SlidingLatentLayer
from modeling_mla.routes_mla import fused_latents

RANK, ROPE, BATCH = 6, 4, 3


def rows(tokens: int, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, tokens, RANK), torch.randn(batch, 1, tokens, ROPE)


def assert_same(layer: LatentLayer, reference: DynamicLayer) -> None:
    assert torch.equal(layer.keys, reference.keys)
    assert torch.equal(layer.values, reference.values)
    assert layer.get_seq_length() == reference.get_seq_length()
    assert layer.get_mask_sizes(3) == reference.get_mask_sizes(3)


def both(layer: LatentLayer, reference: DynamicLayer, tokens: int) -> None:
    new = rows(tokens)
    for actual, expected in zip(layer.update(*new), reference.update(*new), strict=True):
        assert torch.equal(actual, expected)


OPERATIONS = {
    "append": lambda layer: None,
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 2, 1])),
    "repeat": lambda layer: (layer.batch_select_indices(torch.tensor([1])), layer.batch_repeat_interleave(3)),
    "crop": lambda layer: layer.crop(-2),
    "crop nothing": lambda layer: layer.crop(0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("capacity", [None, 64])
def test_layer_holds_what_the_stock_layer_holds(operation, capacity):
    layer, reference = LatentLayer(capacity), DynamicLayer()
    OPERATIONS[operation](layer)  # nothing to do yet, as generation may do before the first token
    for tokens in (5, 1, 1, 70, 1):
        both(layer, reference, tokens)
        OPERATIONS[operation](layer)
        OPERATIONS[operation](reference)
        assert_same(layer, reference)


def test_repeat_interleave_order():
    layer, reference = LatentLayer(), DynamicLayer()
    both(layer, reference, 4)
    layer.batch_repeat_interleave(2)
    reference.batch_repeat_interleave(2)
    assert_same(layer, reference)


def test_selecting_rows_does_not_touch_a_sibling():
    """A beam's cache is written after reordering; rows that came from one row must not share storage."""
    layer = LatentLayer()
    layer.update(*rows(3))
    layer.reorder_cache(torch.tensor([0, 0, 0]))
    new = rows(1)
    keys, _ = layer.update(*new)
    assert torch.equal(keys[:, :, -1:], new[0])


def test_keys_values_and_visible_are_views_of_one_buffer():
    layer = LatentLayer(capacity=10)
    keys, values = layer.update(*rows(4))
    address = layer.buffer.untyped_storage().data_ptr()
    for view in (keys, values, layer.keys, layer.values, layer.visible, fused_latents(keys, values)):
        assert view.untyped_storage().data_ptr() == address
    assert torch.equal(layer.visible, torch.cat((keys, values), dim=-1).squeeze(1))
    assert torch.equal(fused_latents(keys, values), layer.visible)


def test_latents_of_another_cache_are_fused_by_copy():
    keys, values = rows(4)
    assert torch.equal(fused_latents(keys, values)[..., RANK:], values.squeeze(1))


def test_growth_is_geometric():
    layer, moves, address = LatentLayer(), 0, None
    for _ in range(3000):
        layer.update(*rows(1, batch=1))
        moves += layer.buffer.data_ptr() != address
        address = layer.buffer.data_ptr()
        assert layer.buffer.shape[1] <= 1.25 * layer.filled + 64
    assert moves < 20
    assert layer.nbytes == layer.buffer.shape[1] * (RANK + ROPE) * 4


def test_known_length_allocates_exactly_and_never_moves():
    layer = LatentLayer(capacity=101)
    layer.update(*rows(100))
    address = layer.buffer.data_ptr()
    layer.update(*rows(1))
    assert layer.nbytes == BATCH * 101 * (RANK + ROPE) * 4
    assert layer.buffer.data_ptr() == address
    layer.update(*rows(1))
    assert layer.get_seq_length() == 102


def test_reset_forgets_tokens_and_batch():
    for layer in (LatentLayer(), SlidingLatentLayer(4)):
        layer.update(*rows(9))
        layer.reset()
        assert (layer.get_seq_length(), layer.nbytes, layer.keys) == (0, 0, None)
        new = rows(2, batch=5)
        assert torch.equal(layer.update(*new)[0], new[0])


def test_positive_crop_is_refused():
    layer = LatentLayer()
    layer.update(*rows(4))
    with pytest.raises(ValueError, match=r"crop\(2\).*pass -n"):
        layer.crop(2)


@pytest.mark.parametrize("window", [2, 3, 7, 20])
@pytest.mark.parametrize("chunks", [[1], [3, 1], [30, 1, 1, 5], [7, 8]])
def test_sliding_layer_equals_the_stock_layer(window, chunks):
    layer, reference = SlidingLatentLayer(window), DynamicSlidingWindowLayer(window)
    for step in range(60):
        both(layer, reference, chunks[step % len(chunks)])
        assert_same(layer, reference)
        if step % 7 == 3:
            layer.reorder_cache(torch.tensor([1, 0, 2]))
            reference.reorder_cache(torch.tensor([1, 0, 2]))
            assert_same(layer, reference)
    assert layer.buffer.shape[1] <= 4 * window + 2 * max(chunks) + 128, "the window slides in bounded memory"


@pytest.mark.parametrize("window", [2, 3, 7, 20])
@pytest.mark.parametrize("seed", range(6))
def test_recorded_past_can_be_cropped(window, seed):
    """As an assistant uses it: candidates are appended, the rejected ones taken back."""
    chance = random.Random(seed)
    layer, reference = SlidingLatentLayer(window), DynamicSlidingWindowLayer(window)
    layer.activate_past_recording()
    reference.activate_past_recording()
    for _ in range(40):
        appended = 0
        for _ in range(chance.randint(1, 3)):
            tokens = chance.randint(1, 5)
            both(layer, reference, tokens)
            appended += tokens
        # Only what came since the last crop is still there as a whole.
        removed = chance.randint(0, appended - 1)
        layer.crop(-removed)
        reference.crop(-removed)
        assert_same(layer, reference)


def test_cropping_a_forgotten_past_is_refused():
    layer = SlidingLatentLayer(4)
    layer.update(*rows(9))
    with pytest.raises(RuntimeError, match=r"crop\(-1\) after 9 tokens.*window of 4.*activate_past_recording"):
        layer.crop(-1)
