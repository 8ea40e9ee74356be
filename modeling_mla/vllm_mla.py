"""The plugin by which vLLM knows this library's models: entry point group ``vllm.general_plugins``.

vLLM's Transformers backend runs the modeling files as they are, with its own MLA attention and its paged latent cache
in place of `MLAttention.expand_kv` and the attention function.
"""

from __future__ import annotations

import importlib

from vllm import ModelRegistry

FAMILIES = ("LlamaMLA", "MistralMLA", "Qwen2MLA", "Qwen3MLA")


def register() -> None:
    """Makes every family known to Transformers' auto classes and to vLLM, in each of vLLM's processes."""
    importlib.import_module(__package__)
    for family in FAMILIES:
        ModelRegistry.register_model(f"{family}ForCausalLM", f"{__package__}.vllm_models_mla:TransformersForCausalLM")
