"""Weights that accelerate keeps elsewhere, where ``kv_b_proj.weight`` is a meta tensor between calls."""

import pytest
import torch
from tiny import assert_close, decode, random_ids, reference_logits, tiny_model

from modeling_mla import LlamaMLAForCausalLM

accelerate = pytest.importorskip("accelerate")

IDS = random_ids(2, 9)


@pytest.mark.parametrize("route", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights(tmp_path, place, route):
    model = tiny_model()
    expected = reference_logits(model, IDS)
    if place == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    else:
        model = accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")
    assert model.model.layers[0].self_attn.kv_b_proj.weight.is_meta
    model.set_attention_route(route)
    for _ in range(2):
        assert_close(decode(model, IDS), expected)
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, tiny_model().generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False))


def test_device_map_with_a_disk(tmp_path):
    model = tiny_model(latent_norm="identity")
    model.save_pretrained(tmp_path / "model")
    expected = reference_logits(model, IDS)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = LlamaMLAForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    assert loaded.model.layers[1].self_attn.kv_b_proj.weight.is_meta
    assert_close(decode(loaded, IDS), expected)


def test_loading_shares_nothing_with_the_meta_device(tmp_path):
    """`from_pretrained` builds on the meta device; tables that are not saved must be computed afterwards."""
    model = tiny_model(
        latent_norm="identity",
        kv_lora_ranks=[5, 16],
        qk_rope_head_dims=[2, 4],
        rope_inv_freq=[[0.7], [1.1, 0.02]],
    )
    model.save_pretrained(tmp_path)
    loaded, info = LlamaMLAForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert_close(decode(loaded, IDS), reference_logits(model, IDS))
