"""Every form of mask that Transformers makes becomes one dense mask."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from modeling_mla.masks_mla import VisibleKeys

CPU = torch.device("cpu")


def visible(attention_mask, queries: int, keys: int, **options) -> torch.Tensor | None:
    return VisibleKeys(attention_mask, queries, keys, CPU, **options).dense()


def causal(queries: int, keys: int, offset: int = 0, window: int | None = None) -> torch.Tensor:
    distance = torch.arange(queries)[:, None] + offset - torch.arange(keys)
    return (distance >= 0) & (distance < (window or keys + queries))


def test_no_mask_is_causal_from_the_start_and_hides_unfilled_keys():
    keys = VisibleKeys(None, 4, 10, CPU)
    assert keys.keys_in_use == 4
    assert torch.equal(keys.dense(), causal(4, 4)[None, None])


def test_one_query_without_a_mask_sees_everything():
    assert visible(None, 1, 10) is None
    assert VisibleKeys(None, 1, 10, CPU).keys_in_use == 10


def test_bidirectional_attention_sees_everything():
    keys = VisibleKeys(None, 4, 10, CPU, is_causal=False)
    assert keys.keys_in_use == 10
    assert keys.dense() is None


def test_four_dimensional_masks_are_taken_as_they_are():
    for mask in (torch.rand(2, 1, 3, 7) > 0.5, torch.randn(2, 1, 3, 7)):
        assert torch.equal(visible(mask, 3, 7), mask)
        keys = VisibleKeys(mask, 3, 7, CPU)
        assert torch.equal(keys.block(slice(1, 3), slice(2, 6)), mask[..., 1:3, 2:6])


def test_block_masks_are_made_dense():
    block = create_block_mask(lambda b, h, q, k: (q + 3 >= k) & (k != b), 2, None, 4, 7, device="cpu")
    expected = causal(4, 7, offset=3)[None, None] & (torch.arange(7) != torch.arange(2)[:, None])[:, None, None]
    keys = VisibleKeys(block, 4, 7, CPU)
    assert torch.equal(keys.dense(), expected)
    assert torch.equal(keys.block(slice(1, 2), slice(3, 6)), expected[..., 1:2, 3:6])


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_flash_masks_are_aligned_to_the_end(queries, window, padded):
    """Flash functions get padding alone, and know of the window by an argument."""
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, :5] = 0
    mask = visible(padding if padded else None, queries, 9, sliding_window=window, aligned_to_end=True)
    expected = causal(queries, 9, offset=9 - queries, window=window).expand(2, 1, -1, -1)
    if padded:
        expected = expected & padding[:, None, None].bool()
    mask = torch.ones(()) if mask is None else mask
    assert torch.equal(mask.bool().expand(2, 1, queries, 9), expected)


def test_kernels_get_what_a_mask_would_be_made_of():
    """No mask between queries and keys exists unless Transformers made one."""
    padding = torch.ones(2, 9, dtype=torch.long)
    keys = VisibleKeys(padding, 3, 9, CPU, sliding_window=4, aligned_to_end=True)
    assert (keys.first_query, keys.window, keys.given().shape) == (6, 4, (2, 1, 1, 9))
    keys = VisibleKeys(None, 3, 9, CPU, aligned_to_end=True)
    assert (keys.first_query, keys.window, keys.given()) == (6, None, None)
    keys = VisibleKeys(None, 3, 9, CPU)
    assert (keys.first_query, keys.keys_in_use, keys.given()) == (0, 3, None)
    whole = torch.rand(2, 1, 3, 9) > 0.5
    keys = VisibleKeys(whole, 3, 9, CPU, sliding_window=4)
    assert (keys.first_query, keys.window) == (None, None)
    assert torch.equal(keys.given(), whole)


@pytest.mark.parametrize(
    ("keys", "hides"),
    [
        (VisibleKeys(None, 1, 9, CPU), False),
        (VisibleKeys(None, 3, 9, CPU, is_causal=False), False),
        (VisibleKeys(None, 3, 9, CPU), True),
        (VisibleKeys(None, 1, 9, CPU, sliding_window=9, aligned_to_end=True), False),
        (VisibleKeys(None, 1, 9, CPU, sliding_window=8, aligned_to_end=True), True),
        (VisibleKeys(torch.ones(2, 9), 1, 9, CPU, aligned_to_end=True), True),
    ],
)
def test_whether_keys_are_hidden(keys, hides):
    assert keys.hides_keys is hides
    assert (keys.dense() is not None) is hides
