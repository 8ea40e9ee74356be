"""OLMo 3: `Olmo3ForCausalLM`."""

from __future__ import annotations

from transformers import Olmo3ForCausalLM
from transformers.models.olmo3.modeling_olmo3 import Olmo3DecoderLayer, Olmo3RotaryEmbedding

from .olmo2 import Olmo2Source
from .rotary_by_layer_type import RotaryByLayerType


class Olmo3Source(RotaryByLayerType, Olmo2Source):
    """As OLMo 2; windows in three layers of four, and a rotary scaling in the fourth."""

    model_type = "olmo3"
    causal_lm = Olmo3ForCausalLM
    decoder_layer_class = Olmo3DecoderLayer
    rotary_class = Olmo3RotaryEmbedding
    mla_name = "Olmo3MLA"
    models = "OLMo 3"
