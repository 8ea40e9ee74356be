"""Fast products are still float32 products."""

import torch

from conversion.products import fast_float32


def test_fast_products_are_as_accurate_as_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(rows, 576, generator=draw) for rows in (256, 1536))
    exact = torch.nn.functional.linear(states.double(), weight.double())
    setting = torch.backends.mkldnn.matmul.fp32_precision
    with fast_float32():
        found = (torch.nn.functional.linear(states, weight), states @ weight.T, (weight @ states.T).T)
    for product in found:
        assert (product - exact).abs().max().item() < 1e-5 * exact.abs().max().item()
    assert torch.backends.mkldnn.matmul.fp32_precision == setting
