"""Every family split by its plan over two processes equals one process: logits, cached decoding, gradients, saving."""

from pathlib import Path

import pytest
import torch
from tiny import EXPERTS, VARIANTS, assert_close, decode, plain_experts, random_ids, tiny_model
from torch import nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from two_processes import run_in_two, whole

from modeling_mla import (
    CohereMLAForCausalLM,
    Gemma2MLAForCausalLM,
    Gemma3MLAForCausalLM,
    GptOssMLAForCausalLM,
    LlamaMLAForCausalLM,
    MistralMLAForCausalLM,
    Olmo2MLAForCausalLM,
    Olmo3MLAForCausalLM,
    Qwen2MLAForCausalLM,
    Qwen3MLAForCausalLM,
    enable_absorbed_attention,
)

IDS = random_ids(2, 9)
NORMS = {"qk_norm_head_dim": 6, "qk_norm_key_heads": 2}
CASES: dict[str, tuple[type, dict]] = {
    "llama": (LlamaMLAForCausalLM, {}),
    "low-rank queries and biases": (LlamaMLAForCausalLM, VARIANTS["q_lora_biases"]),
    "biases": (LlamaMLAForCausalLM, VARIANTS["biases"]),
    "layers of other widths": (LlamaMLAForCausalLM, VARIANTS["per_layer"]),
    "gemma2": (Gemma2MLAForCausalLM, {"hidden_size": 64, "sliding_window": 6, "attn_implementation": "eager"}),
    "gemma3": (Gemma3MLAForCausalLM, NORMS | {"hidden_size": 64}),
    "cohere": (CohereMLAForCausalLM, {}),
    "cohere with norms": (CohereMLAForCausalLM, NORMS | {"use_qk_norm": True}),
    "gpt-oss": (GptOssMLAForCausalLM, EXPERTS | {"sliding_window": 6, "attn_implementation": "eager"}),
    "mistral": (MistralMLAForCausalLM, {"sliding_window": 6}),
    "olmo2": (Olmo2MLAForCausalLM, NORMS | {"attention_bias": True}),
    "olmo3": (Olmo3MLAForCausalLM, NORMS | {"sliding_window": 6}),
    "qwen2": (Qwen2MLAForCausalLM, {}),
    "qwen3": (Qwen3MLAForCausalLM, NORMS),
    "qwen3 with biases": (Qwen3MLAForCausalLM, NORMS | {"attention_bias": True}),
}


def deepseek() -> PreTrainedModel:
    """A native model, whose plan is Transformers'."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        initializer_range=0.2,
        pad_token_id=None,
        eos_token_id=None,
    )
    return DeepseekV2ForCausalLM(config).double().eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}


def generate(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=5, do_sample=False)


def split(cls: type, folder: Path) -> PreTrainedModel:
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    model = plain_experts(cls.from_pretrained(folder, dtype=torch.float64, distributed_config=config).eval())
    projection = model.model.layers[0].self_attn.kv_b_proj
    assert projection.weight.to_local().shape[0] == projection.out_features / 2, "heads must be split"
    return model


def compare_families(folder: Path) -> None:
    for name, (cls, _) in CASES.items():
        model, expected = split(cls, folder / name), torch.load(folder / f"{name}.pt")
        for route in ("expanded", "absorbed", "auto"):
            model.set_attention_route(route)
            assert_close(decode(model, IDS), expected["logits"])
        assert torch.equal(generate(model), expected["generated"]), name
        for parameter, gradient in gradients(model).items():
            assert (gradient - expected["gradients"][parameter]).abs().max() < 1e-9, f"{parameter} of {name}"
        model.set_attention_route("absorbed")
        with pytest.raises(ValueError, match="kv_b_proj cannot be absorbed: it is split over processes"):
            model(IDS, labels=IDS)
        model.save_pretrained(folder / f"{name} again")
        torch.distributed.barrier()
        again = plain_experts(cls.from_pretrained(folder / f"{name} again", dtype=torch.float64).eval())
        assert_close(decode(again, IDS), expected["logits"])


def compare_native(folder: Path) -> None:
    expected = torch.load(folder / "native.pt")
    model = enable_absorbed_attention(split(DeepseekV2ForCausalLM, folder / "native"))
    for route in ("expanded", "absorbed", "auto"):
        model.set_attention_route(route)
        assert_close(decode(model, IDS), expected, 1e-5)


def compare(folder: Path) -> None:
    compare_families(folder)
    compare_native(folder)


def test_two_processes_equal_one(tmp_path):
    for name, (cls, fields) in CASES.items():
        model = tiny_model(cls, **fields)
        model.save_pretrained(tmp_path / name)
        expected = {"logits": decode(model, IDS), "generated": generate(model), "gradients": gradients(model)}
        assert all(gradient.any() for gradient in expected["gradients"].values())
        torch.save(expected, tmp_path / f"{name}.pt")
    native = deepseek()
    native.save_pretrained(tmp_path / "native")
    torch.save(decode(native, IDS), tmp_path / "native.pt")
    run_in_two(compare, tmp_path)
