"""Which model of mlx-lm is the body of a family, and what of the family's configurations it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..errors import SourceError

_SILU = {"hidden_act": ("silu",)}
_TANH = {"hidden_activation": ("gelu_pytorch_tanh",)}
_TIED, _UNTIED = {"tie_word_embeddings": (True,)}, {"tie_word_embeddings": (False,)}
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activations of Transformers, as `mlx_model` calls them."""


@dataclass(frozen=True)
class MlxBody:
    """One module of ``mlx_lm.models``.

    Args:
        module: its name.
        only: values of fields beside which the module would compute something else; it does not look at these fields.
        attention: what a layer calls its attention.
        mlp: the two projections of an MLP without a gate; it is replaced by one that has the activation of the
            configuration, of which the module has another.
    """

    module: str
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    attention: str = "self_attn"
    mlp: tuple[str, str] | None = None

    def own_mlp(self, config: PreTrainedConfig) -> dict[str, Any] | None:
        """The arguments of `mlx_model.PlainMLP`; None where the body's MLP stays."""
        if self.mlp is None:
            return None
        bias = getattr(config, "use_bias", True)
        return {"names": list(self.mlp), "activation": _GELU[config.hidden_act], "bias": bias}


_LLAMA = MlxBody("llama", _SILU)
_BODIES = {
    "cohere": MlxBody("cohere", _SILU | _TIED),
    "gemma2": MlxBody("gemma2", _TANH | _TIED),
    "gemma3_text": MlxBody("gemma3_text", _TANH | {"final_logit_softcapping": (None,)}),
    "glm4": MlxBody("glm4", _SILU | _UNTIED),
    "gpt_neox": MlxBody(
        "gpt_neox",
        {"hidden_act": tuple(_GELU)} | _UNTIED,
        attention="attention",
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "gpt_oss": MlxBody("gpt_oss", _SILU | _UNTIED),
    "granite": MlxBody("granite", _SILU),
    "granitemoe": MlxBody("granitemoe", _SILU),
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": MlxBody("mixtral", _SILU),
    "olmo2": MlxBody("olmo2", _SILU),
    "olmo3": MlxBody("olmo3", _SILU),
    "phi3": MlxBody("phi3", _SILU),
    "qwen2": _LLAMA,
    "qwen2_moe": MlxBody(
        "qwen2_moe",
        _SILU | _UNTIED | {"norm_topk_prob": (False,), "mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
    ),
    "qwen3": _LLAMA,
    "qwen3_moe": MlxBody("qwen3_moe", _SILU),
    "smollm3": _LLAMA,
    "starcoder2": MlxBody("starcoder2", {"hidden_act": tuple(_GELU)}, mlp=("c_fc", "c_proj")),
}
"""By the source's family. Llama's body is that of every family which differs from it in nothing but attention."""


def mlx_body(config: PreTrainedConfig) -> MlxBody:
    """The body of a model of this library.

    Raises:
        SourceError: mlx-lm has none, or it would compute something else.
    """
    family = config.model_type.removesuffix("_mla")
    if family not in _BODIES:
        raise SourceError(f"mlx-lm has no body for {config.model_type}; serve the model with Transformers.")
    body = _BODIES[family]
    for name, values in body.only.items():
        value = getattr(config, name, values[0])
        if value not in values:
            allowed = " or ".join(map(str, values))
            raise SourceError(
                f"{name} is {value}, and mlx-lm's {body.module} computes {allowed} alone; serve the model with "
                "Transformers."
            )
    if family == "gemma2" and config.final_logit_softcapping is None:
        raise SourceError(
            "final_logit_softcapping is None, and mlx-lm's gemma2 always caps; serve the model with Transformers."
        )
    return body
