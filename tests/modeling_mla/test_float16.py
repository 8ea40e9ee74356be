"""Models in float16, whose largest number is below the constant of the latent norm."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import decode, random_ids, reference_logits, tiny_config, tiny_model
from torch import nn

from modeling_mla import LlamaMLAForCausalLM
from modeling_mla.configuration_mla import IDENTITY_NORM_WEIGHT

IDS = random_ids(2, 9)
NORM = "model.layers.0.self_attn.kv_a_layernorm.weight"
CONSTANT = [IDENTITY_NORM_WEIGHT] * 16


def made(how: str, folder) -> nn.Module:
    """A model with identity norms, in float16 in one of the ways to get there."""
    if how == "from_config":
        return LlamaMLAForCausalLM._from_config(tiny_config(latent_norm="identity"), dtype=torch.float16).eval()
    model = tiny_model(dtype=torch.float32, latent_norm="identity")
    if how == "from_pretrained":
        model.save_pretrained(folder / "float32")
        return LlamaMLAForCausalLM.from_pretrained(folder / "float32", dtype=torch.float16)
    return model.half() if how == "half" else model.to(torch.float16)


@pytest.mark.parametrize("how", ["half", "to", "from_config", "from_pretrained"])
def test_save_and_load(how, tmp_path):
    model = made(how, tmp_path)
    assert model.dtype == torch.float16
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path / "float16")
    stored = load_file(tmp_path / "float16" / "model.safetensors")
    assert stored[NORM].tolist() == CONSTANT
    assert {tensor.dtype for name, tensor in stored.items() if "kv_a_layernorm" not in name} == {torch.float16}
    loaded = LlamaMLAForCausalLM.from_pretrained(tmp_path / "float16", dtype=torch.float16)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    wide = LlamaMLAForCausalLM.from_pretrained(tmp_path / "float16", dtype=torch.float64)
    assert wide.state_dict()[NORM].tolist() == CONSTANT


def test_infinities_of_former_checkpoints_are_not_saved_again(tmp_path):
    model = tiny_model(dtype=torch.float32, latent_norm="identity").half()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored |= {name: tensor.half() for name, tensor in stored.items() if "kv_a_layernorm" in name}
    assert stored[NORM].isinf().all()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = LlamaMLAForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")[NORM].tolist() == CONSTANT


@pytest.mark.parametrize("route", ["absorbed", "expanded"])
@pytest.mark.parametrize("latent_norm", ["identity", "rms_norm"])
def test_decode(route, latent_norm):
    model = tiny_model(dtype=torch.float16, latent_norm=latent_norm)
    model.set_attention_route(route)
    expected = reference_logits(model.double(), IDS)
    error = (decode(model.half(), IDS).double() - expected).abs().max()
    assert error < 1e-2 * expected.abs().max()
