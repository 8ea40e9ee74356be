"""The projections that PEFT adapts where a user names none."""

from __future__ import annotations

import sys

ATTENTION_PROJECTIONS = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def register_peft_targets(model_type: str) -> None:
    """Makes the attention projections PEFT's default for a family, if PEFT is in use.

    PEFT keeps its defaults by model type, and knows none for any MLA model. It is not imported here: that takes longer
    than importing this package.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    usual = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]
    for name, mapping in vars(constants).items():
        # Methods that adapt in Llama what LoRA adapts; others choose norms or the MLP.
        if name.endswith("_TARGET_MODULES_MAPPING") and mapping.get("llama") == usual:
            mapping.setdefault(model_type, list(ATTENTION_PROJECTIONS))
