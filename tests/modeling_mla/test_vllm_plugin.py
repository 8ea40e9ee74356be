"""What vLLM looks for in the modeling files, and what its plugin refuses. `make vllm-check` runs vLLM itself."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VARIANTS, tiny_config, tiny_model

import modeling_mla
from modeling_mla import (
    CohereMLAConfig,
    Gemma2MLAConfig,
    GPTNeoXMLAConfig,
    GptOssMLAConfig,
    GraniteMLAConfig,
    LlamaMLAConfig,
    MistralMLAConfig,
    MixtralMLAConfig,
    MLAttention,
    Phi3MLAConfig,
    Qwen2MLAConfig,
    Qwen3MLAConfig,
    SmolLM3MLAConfig,
)
from modeling_mla.attention_mla import ALL_ATTENTION_FUNCTIONS, IdentityRMSNorm
from modeling_mla.vllm_mla import refuse_unservable, refuse_width

LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
    },
    "rope_inv_freq": [[1.0, 0.1]],
    "rope_long_inv_freq": [[0.5, 0.05]],
}
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_identity_norm_is_an_rms_norm_to_whom_reads_its_graph() -> None:
    traced = torch.fx.symbolic_trace(IdentityRMSNorm(16))
    called = [str(node.target).rpartition(".")[2] for node in traced.graph.nodes]
    assert any("rsqrt" in name for name in called)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 16).to(dtype)
        assert torch.equal(traced.to(dtype)(x), x)


def test_expansion_is_recognisable() -> None:
    """One method of two arguments that names ``kv_b_proj`` and writes out pairs, called once by ``forward``."""
    code = MLAttention.expand_kv.__code__
    assert code.co_argcount == 3
    assert "kv_b_proj" in code.co_names
    tree = ast.parse(textwrap.dedent(inspect.getsource(MLAttention.expand_kv)))
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    assert returns
    assert all(isinstance(value, ast.Tuple) and len(value.elts) == 2 for value in returns)
    assert inspect.getsource(MLAttention.forward).count("self.expand_kv(") == 1


def test_cache_width_is_the_head_size() -> None:
    config = tiny_config(LlamaMLAConfig, kv_lora_rank=16, qk_rope_head_dim=4)
    assert (config.head_dim, config.num_key_value_heads) == (20, config.num_attention_heads)


def test_plugin_registers_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["modeling_mla"].partition(":")
    getattr(importlib.import_module(module), function)()
    families = {name for name in modeling_mla.__all__ if name.endswith("ForCausalLM")}
    assert len(families) >= 4
    assert registered == dict.fromkeys(families, "modeling_mla.vllm_models_mla:TransformersForCausalLM")


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (Qwen3MLAConfig, {}, "qwen3_mla normalises"),
        (Gemma2MLAConfig, {"attn_logit_softcapping": 30.0}, "gemma2_mla caps its scores at 30.0"),
        (GptOssMLAConfig, {}, "gpt_oss_mla has attention sinks"),
        (
            CohereMLAConfig,
            {"use_qk_norm": True, "qk_norm_head_dim": 8, "qk_norm_key_heads": 2},
            "cohere_mla normalises",
        ),
        (LlamaMLAConfig, {"q_lora_rank": 8}, "q_lora_rank is 8"),
        (LlamaMLAConfig, {"q_head_dim": 8}, "q_head_dim is 8.*mla export"),
        (LlamaMLAConfig, {"kv_lora_ranks": [5, 16]}, "latents of 5 to 16 .*mla export"),
        (MistralMLAConfig, {"sliding_window": 100}, "sliding window is 100 tokens"),
        (SmolLM3MLAConfig, {"no_rope_layers": [1, 0]}, "rotary keys of 0 to 4 values"),
        (MixtralMLAConfig, {}, "mixtral_mla has experts"),
        (GraniteMLAConfig, {"logits_scaling": 4.0}, r"logits_scaling is 4\.0"),
        (GPTNeoXMLAConfig, {}, "gpt_neox_mla stores its head"),
        (Phi3MLAConfig, LONGROPE, "beyond 16 tokens .* --max-model-len 16"),
        (Qwen2MLAConfig, {"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 1}, "window is 99"),
    ],
)
def test_plugin_refuses_by_name(config_class: type, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_unservable(tiny_config(config_class, **fields), max_model_len=256, dtype=torch.bfloat16)


def test_plugin_refuses_float16_where_the_latent_norm_is_a_constant_that_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"float16 cannot hold .*--dtype bfloat16"):
        refuse_unservable(tiny_config(latent_norm="identity"), max_model_len=256, dtype=torch.float16)
    refuse_unservable(tiny_config(latent_norm="rms_norm"), max_model_len=256, dtype=torch.float16)


@pytest.mark.parametrize(("rank", "rope"), [(256, 64), (448, 64), (512, 64), (544, 32)])
def test_plugin_serves_widths_of_vllm_unpadded(rank: int, rope: int) -> None:
    refuse_width(tiny_config(kv_lora_rank=rank, qk_rope_head_dim=rope))


@pytest.mark.parametrize(("rank", "rope"), [(80, 64), (257, 64), (512, 32)])
def test_plugin_refuses_other_widths(rank: int, rope: int) -> None:
    with pytest.raises(ValueError, match=f"a cache of {rank + rope} values, .* 320, 512, 576; .*mla export"):
        refuse_width(tiny_config(kv_lora_rank=rank, qk_rope_head_dim=rope))


@pytest.mark.parametrize("fields", [{"sliding_window": None}, {"sliding_window": 256}])
def test_plugin_serves_what_a_window_does_not_cut(fields: dict) -> None:
    refuse_unservable(tiny_config(MistralMLAConfig, **fields), max_model_len=256, dtype=torch.bfloat16)


class Pair(torch.fx.Proxy):
    """Whatever the attention takes apart, and the shape of its sequences, has two parts."""

    def __len__(self) -> int:
        return 2


class Reader(torch.fx.Tracer):
    """Reads a graph down to modules, as vLLM does."""

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return Pair(node, self)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def iter(self, obj: torch.fx.Proxy) -> Iterator[torch.fx.Proxy]:
        return iter((obj[0], obj[1]))


@pytest.mark.one_route
@pytest.mark.parametrize("fields", [{}, {"latent_norm": "identity"}, VARIANTS["rope_in_one_layer"]], ids=str)
def test_the_graph_leads_from_input_to_latents_and_to_their_projection(fields: dict) -> None:
    """``kv_b_proj(kv_a_layernorm(kv_a_proj_with_mqa(input)))``, by which vLLM knows MLA."""
    attention = tiny_model(**fields).model.layers[1].self_attn
    attention.config._attn_implementation = "an engine's"
    reader = Reader()
    # Behind the expansion may be what cannot be read; vLLM goes by what it has read till then.
    with contextlib.suppress(Exception):
        reader.trace(attention, {"past_key_values": None})
    (node,) = (node for node in reader.graph.nodes if node.target == "kv_b_proj")
    path = []
    while node.op != "placeholder":
        path += [node.target] if node.op == "call_module" else []
        node = node.args[0] if isinstance(node.args[0], torch.fx.Node) else node.args[0][0]
    assert path == ["kv_b_proj", "kv_a_layernorm", "kv_a_proj_with_mqa"]
    assert node.target == "hidden_states"


def test_an_engine_gives_tokens_of_all_sequences_in_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = tiny_model().model.layers[0].self_attn
    attention.config._attn_implementation = "an engine's"
    states, (cos, sin) = torch.randn(2, 5, 32).double(), torch.rand(2, 2, 5, 1, 2).double()

    def by_head(_: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: object, **___: object):
        return ((query @ key.mT).softmax(-1) @ value).transpose(1, 2), None

    def flat(*given: Any, **named: Any):
        return by_head(*given, **named)[0].flatten(2).flatten(0, 1), None

    outputs = []
    for function in (by_head, flat):
        monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_, function=function: function)
        outputs.append(attention(states, (cos, sin))[0])
    assert torch.equal(*outputs)
