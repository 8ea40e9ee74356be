"""vLLM's Transformers backend for this library's models, with the checks that it does not make itself."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import transformers as backend

from .vllm_mla import refuse_unservable, refuse_width


class TransformersForCausalLM(backend.TransformersForCausalLM):
    """vLLM recognises its backend by this name.

    Raises:
        ValueError: the model would be served without its latent cache, or with other results.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        refuse_unservable(model_config.hf_text_config, model_config.max_model_len, model_config.dtype)
        refuse_width(model_config.hf_text_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Where vLLM could not fuse a model, it warns and attends to expanded keys and values.
        if not model_config.use_mla:
            raise ValueError(
                f"vLLM does not use its MLA attention for {model_config.model}; unset VLLM_MLA_DISABLE, and see "
                "vLLM's log for what it could not fuse."
            )
