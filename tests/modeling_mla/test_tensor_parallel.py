"""Every family split by its plan over two processes equals one process: logits, cached decoding, gradients, saving."""

from pathlib import Path

import pytest
import torch
from tiny import EXPERTS, VARIANTS, assert_close, decode, random_ids, tiny_model
from torch import nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from two_processes import run_in_two, whole

import modeling_mla
from modeling_mla import enable_absorbed_attention

IDS = random_ids(2, 9)
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NORMS = {"qk_norm_head_dim": 6, "qk_norm_key_heads": 2}
CASES: dict[str, tuple[str, dict]] = {
    "cohere": ("Cohere", {}),
    "cohere with norms": ("Cohere", NORMS | {"use_qk_norm": True}),
    "gemma2": ("Gemma2", {"hidden_size": 64, "sliding_window": 6, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3", NORMS | {"hidden_size": 64}),
    "glm4": ("Glm4", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox with a tied head": ("GPTNeoX", {"tie_word_embeddings": True}),
    "gpt-oss": ("GptOss", EXPERTS | {"sliding_window": 6, "attn_implementation": "eager"}),
    "granite": ("Granite", {"attention_multiplier": 0.4, "residual_multiplier": 0.3}),
    "granite with experts": ("GraniteMoe", {"attention_multiplier": 0.4, "num_local_experts": 4}),
    "llama": ("Llama", {}),
    "low-rank queries and biases": ("Llama", VARIANTS["q_lora_biases"]),
    "biases": ("Llama", VARIANTS["biases"]),
    "queries by head": ("Llama", VARIANTS["q_by_head"]),
    "layers of other widths": ("Llama", VARIANTS["per_layer"]),
    "ministral": ("Ministral", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "olmo2": ("Olmo2", NORMS | {"attention_bias": True}),
    "olmo3": ("Olmo3", NORMS | {"sliding_window": 6}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with experts": ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 24}),
    "qwen3": ("Qwen3", NORMS),
    "qwen3 with biases": ("Qwen3", NORMS | {"attention_bias": True}),
    "qwen3 with experts": ("Qwen3Moe", NORMS | MIXTURE | {"mlp_only_layers": [1]}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "qk_nope_head_dims": [0, 8]}),
    "starcoder2": ("Starcoder2", {"q_bias": True, "o_bias": True}),
}
"""The family, and fields of its configuration."""


def class_of(family: str) -> type[PreTrainedModel]:
    return getattr(modeling_mla, f"{family}MLAForCausalLM")


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
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = cls.from_pretrained(folder, distributed_config=config, **options).eval()
    projection = next(module for name, module in model.named_modules() if name.endswith("kv_b_proj"))
    assert projection.weight.to_local().shape[0] == projection.out_features / 2, "heads must be split"
    return model


def compare_families(folder: Path) -> None:
    for name, (family, _) in CASES.items():
        cls = class_of(family)
        model, expected = split(cls, folder / name), torch.load(folder / f"{name}.pt")
        for route in ("expanded", "absorbed", "auto"):
            model.set_attention_route(route)
            assert_close(decode(model, IDS), expected["logits"])
        assert torch.equal(generate(model), expected["generated"]), name
        # Routers choose experts in float32, and so is the gradient that each process gets through its part of them.
        tolerance = 1e-6 if hasattr(model.config, "num_experts_per_tok") else 1e-9
        for parameter, gradient in gradients(model).items():
            assert (gradient - expected["gradients"][parameter]).abs().max() < tolerance, f"{parameter} of {name}"
        model.set_attention_route("absorbed")
        with pytest.raises(ValueError, match="kv_b_proj cannot be absorbed: it is split over processes"):
            model(IDS, labels=IDS)
        model.save_pretrained(folder / f"{name} again")
        torch.distributed.barrier()
        options = {"dtype": torch.float64, "experts_implementation": "eager"}
        again = cls.from_pretrained(folder / f"{name} again", **options).eval()
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


@pytest.mark.long
def test_two_processes_equal_one(tmp_path):
    for name, (family, fields) in CASES.items():
        model = tiny_model(class_of(family), **fields)
        model.save_pretrained(tmp_path / name)
        expected = {"logits": decode(model, IDS), "generated": generate(model), "gradients": gradients(model)}
        assert all(gradient.any() for gradient in expected["gradients"].values())
        torch.save(expected, tmp_path / f"{name}.pt")
    native = deepseek()
    native.save_pretrained(tmp_path / "native")
    torch.save(decode(native, IDS), tmp_path / "native.pt")
    run_in_two(compare, tmp_path)
