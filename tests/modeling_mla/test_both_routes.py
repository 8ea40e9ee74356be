"""The comparison of both routes finds an absorbed route that is off by one per cent, wherever it is called."""

import pytest
import torch
from native_zoo import DENSE, build
from tiny import decode, random_ids, tiny_model

from modeling_mla import enable_absorbed_attention
from modeling_mla.backend_torch_mla import TorchBackend


def prefill(model):
    model(random_ids(2, 30))


def step(model):
    decode(model, random_ids(2, 9))


def greedy(model):
    model.generate(random_ids(1, 6), max_new_tokens=4, do_sample=False)


def static(model):
    model.generate(random_ids(1, 6), max_new_tokens=4, cache_implementation="static", disable_compile=True)


def train(model):
    ids = random_ids(2, 9)
    model.train()(ids, labels=ids).loss.backward()


def native(_):
    model = enable_absorbed_attention(build(DENSE["deepseek_v3"]()))
    model.generate(torch.arange(2, 9)[None], max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("use", [prefill, step, greedy, static, train, native])
def test_one_per_cent_is_found(use, dtype, attn_implementation, both_routes, monkeypatch):
    use(tiny_model(dtype=dtype, attn_implementation=attn_implementation))
    assert both_routes.calls > 0
    attend = TorchBackend.attend

    def wrong(self, *arguments):
        context, lse = attend(self, *arguments)
        return 1.01 * context, lse

    monkeypatch.setattr(TorchBackend, "attend", wrong)
    with pytest.raises(AssertionError, match="routes differ"):
        use(tiny_model(dtype=dtype, attn_implementation=attn_implementation))
