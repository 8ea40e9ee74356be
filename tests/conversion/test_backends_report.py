"""``mla backends``: every backend, usable or not, and why."""

import json

import pytest
import torch
from commands import mla

from modeling_mla.backends_mla import BACKENDS

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU says")


def test_every_backend_is_usable_or_has_a_reason(monkeypatch):
    monkeypatch.delenv("MODELING_MLA_BACKEND", raising=False)
    result = mla("backends", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["name"] for row in report["backends"]] == list(BACKENDS)
    for row in report["backends"]:
        assert row["usable"] or all(row["unusable"].values())
        assert row["serves"]
    assert report["auto"]["cpu"][-1] == "torch"
    assert report["override"] is None


@needs_no_gpu
def test_without_a_gpu_it_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MODELING_MLA_BACKEND", "torch")
    result = mla("backends")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "the package triton is not installed" in shown or "PyTorch finds no NVIDIA GPU" in shown
    assert "auto tries, on cpu: cpu, " in shown
    assert "MODELING_MLA_BACKEND is torch." in shown
