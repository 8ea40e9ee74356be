"""Fast products are still float32 products, and the setting that makes them so is put back."""

from pathlib import Path

import pytest
import torch

from conversion.forward import products

MATMUL = torch.backends.mkldnn.matmul


def _has_amx() -> bool:
    description = Path("/proc/cpuinfo")
    return description.is_file() and "amx_bf16" in description.read_text(encoding="utf-8")


@pytest.mark.parametrize("amd", [True, False])
def test_the_setting_holds_inside_and_is_put_back(amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_amd", lambda: amd)
    before = MATMUL.fp32_precision
    assert before != "bf16"
    with products.fast_float32():
        assert MATMUL.fp32_precision == ("bf16" if amd else before)
    assert MATMUL.fp32_precision == before
    with pytest.raises(ZeroDivisionError), products.fast_float32():
        _ = 1 / 0
    assert MATMUL.fp32_precision == before


def test_products_are_as_accurate_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor without AMX, as an AMD is, the fast path itself; with AMX the one that is taken there."""
    if not _has_amx():
        monkeypatch.setattr(products, "_is_amd", lambda: True)
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(rows, 576, generator=draw) for rows in (256, 1536))
    exact = torch.nn.functional.linear(states.double(), weight.double())
    with products.fast_float32():
        found = (torch.nn.functional.linear(states, weight), states @ weight.T, (weight @ states.T).T)
    for product in found:
        assert (product - exact).abs().max().item() < 1e-5 * exact.abs().max().item()
