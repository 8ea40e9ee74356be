"""Masks as runs of keys: what is found gives the mask back, and what is no run is not taken for one."""

import pytest
import torch
from decode_cases import KINDS, Case, visible_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_mla import masks_mla
from modeling_mla.masks_mla import RowBounds, VisibleKeys

CPU = torch.device("cpu")


def shown(bounds: RowBounds, queries: int, keys: int) -> torch.Tensor:
    """``[B, n, S]`` written out, query by query, as the bounds are defined."""
    seen = torch.zeros(len(bounds.starts), queries, keys, dtype=torch.bool)
    for b, (start, end) in enumerate(zip(bounds.starts.tolist(), bounds.ends.tolist(), strict=True)):
        for i in range(queries):
            place = end - queries + i
            last = place + 1 if bounds.causal else end
            first = start if bounds.window is None else max(start, place - bounds.window + 1)
            seen[b, i, max(first, 0) : max(last, 0)] = True
    return seen


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    queries=st.integers(1, 6),
    keys=st.integers(8, 40),
    batch=st.integers(1, 3),
    window=st.integers(1, 45),
)
def test_bounds_are_the_mask_or_none(kind, queries, keys, batch, window):
    case = Case(kind, batch=batch, queries=queries, keys=keys, window=window)
    visible, bias = visible_keys(case, CPU)
    bounds = visible.bounds(batch)
    if bounds is not None:
        wanted = bias[:, 0] > float("-inf")
        assert torch.equal(shown(bounds, queries, keys), wanted)
        assert bounds.from_zero == bool((bounds.starts == 0).all())
        assert bounds.to_last == bool((bounds.ends == keys).all())
    elif kind in ("none", "causal", "window"):
        raise AssertionError("these are always runs")


@pytest.mark.parametrize("queries", [1, 4])
def test_what_transformers_makes_of_padding_has_bounds(queries):
    """4-D, as for SDPA: sequences padded on the left, behind a cache that is not filled to its end."""
    keys, filled = 30, 20
    key, place = torch.arange(keys), torch.arange(filled - queries, filled)[:, None]
    starts = torch.tensor([0, 7])
    mask = (key >= starts[:, None, None]) & (key <= place)
    bounds = VisibleKeys(mask[:, None], queries, keys, CPU).bounds(2)
    assert bounds is not None
    assert (bounds.starts.tolist(), bounds.ends.tolist()) == ([0, 7], [filled, filled])
    assert (bounds.causal, bounds.window, bounds.from_zero, bounds.to_last) == (queries > 1, None, False, False)


@pytest.mark.parametrize("kind", ["bool of a head", "additive", "lowest", "nothing"])
def test_what_is_no_run_has_none(kind):
    visible, _ = visible_keys(Case(kind, queries=3), CPU)
    assert visible.bounds(2) is None


def test_a_hole_is_no_run():
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[0, 4] = 0
    assert VisibleKeys(mask, 1, 10, CPU, aligned_to_end=True).bounds(1) is None


def test_layers_that_share_a_mask_look_once(monkeypatch):
    looked = []
    runs = masks_mla._runs
    monkeypatch.setattr(masks_mla, "_runs", lambda *arguments: looked.append(1) or runs(*arguments))
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    found = [VisibleKeys(mask, 1, 10, CPU).bounds(2) for _ in range(3)]
    assert looked == [1]
    assert found[0] is found[2]
    mask[1, ..., :3] = False
    assert VisibleKeys(mask, 1, 10, CPU).bounds(2).starts.tolist() == [0, 3], "a mask may be written to"
