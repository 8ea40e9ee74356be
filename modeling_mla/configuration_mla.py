"""The fields that Multi-head Latent Attention adds to a body's configuration, their validation, cache arithmetic.

A family mixes :class:`MLAConfigMixin` into the configuration of its Transformers body, so that everything which is
not attention keeps the name, the default and the meaning that it has there.
"""

# No `from __future__ import annotations`: `@strict` checks a field's values by its type, and skips a type in quotes.
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedConfig

from .latent_code_mla import EXACT, LatentCode, check_latent_bits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Body
else:
    _Body = object

IDENTITY_NORM_EPS = float(2**40)
"""With ``IDENTITY_NORM_WEIGHT`` this makes any RMSNorm an identity, bit-exact in float32 and bfloat16.

No pair does in float16: where the mean square vanishes beside epsilon, the normalised latent is too small for it."""
IDENTITY_NORM_WEIGHT = float(2**20)


def identity_norm_weight(size: int, dtype: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    """``[size]``, as it is stored beside tensors of ``dtype``: in float32 beside float16, which ends at 2**16."""
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return torch.full((size,), IDENTITY_NORM_WEIGHT, dtype=dtype, device=device)


def norm_epsilon(config: PreTrainedConfig) -> float:
    """Of the body's norms, which each family names after their kind."""
    names = ("rms_norm_eps", "norm_epsilon", "layer_norm_eps")
    return next(getattr(config, name) for name in names if hasattr(config, name))


@dataclass(kw_only=True, repr=False)
class MLAConfigMixin(_Body):
    """Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) on top of a body's configuration.

    Args:
        kv_lora_rank: width of the cached latent, the largest over the layers.
        kv_lora_ranks: width for every layer, where they differ.
        q_lora_rank: width of the query's low-rank path; None is a full ``q_proj``.
        q_head_dim: channels of a head's query that ``q_proj`` gives, which ``q_head_proj`` maps to un-rotated and
            rotated ones, head by head; None where ``q_proj`` gives these. A head of a converted model has the channels
            of its source, and meets all rotary channels of the cache.
        qk_nope_head_dim: un-rotated query/key channels of a head (0: rotary channels only), the most of any layer.
        qk_nope_head_dims: the same for every layer, where they differ.
        qk_rope_head_dim: channels of the shared rotary key, even, the largest over the layers (0: no rotary key).
        qk_rope_head_dims: the same for every layer, where they differ; needs ``rope_inv_freq``, unless a layer
            has all of them or none.
        v_head_dim: value channels of a head.
        rope_interleave: rotary pairs are channels ``(2f, 2f+1)`` as in DeepSeek, not ``(f, f + d/2)`` as in Llama.
        rope_inv_freq: explicit inverse frequencies, radians per token: one row that all layers share, or one row a
            layer. None derives them from ``rope_parameters`` over ``qk_rope_head_dim`` channels.
        rope_long_inv_freq: as many explicit frequencies for texts beyond the original context, which
            ``rope_parameters`` names (longrope): Transformers goes over to them when a position is beyond it.
        rope_inv_freq_source: what explicit frequencies come from, ``{"head_dim": channels, "rope_parameters": ...}``:
            a scaling that ``rope_parameters`` is given later then acts on them.
        rope_attention_factor: multiplies cos and sin beside explicit frequencies (YaRN).
        rope_attention_factors: the same for every layer, where they differ; needs a row of frequencies a layer.
        softmax_scale: multiplies the scores; None is ``(qk_nope_head_dim + qk_rope_head_dim) ** -0.5``.
        q_bias: the query's projection has a bias.
        kv_a_bias: the down projection has one (``kv_b_proj`` never has).
        o_bias: the output projection has one.
        latent_norm: ``"rms_norm"`` (DeepSeek) or ``"identity"`` (converted models, which have no latent norm).
        latent_code: in how few bits a latent is cached, ``LatentCode.to_dict()``: one for all layers, or a list of one
            (or None) a layer. None caches in the model's precision.
    """

    model_auto_map: ClassVar[dict[str, str]] = {}
    """Every AutoModel class of the family, set by `register_family`: Transformers writes only the class that was saved,
    after which the other ones cannot load the checkpoint."""

    kv_lora_rank: int = 512
    kv_lora_ranks: list[int] | None = None
    q_lora_rank: int | None = None
    q_head_dim: int | None = None
    qk_nope_head_dim: int = 128
    qk_nope_head_dims: list[int] | None = None
    qk_rope_head_dim: int = 64
    qk_rope_head_dims: list[int] | None = None
    v_head_dim: int = 128
    rope_interleave: bool = False
    rope_inv_freq: list[list[float]] | None = None
    rope_long_inv_freq: list[list[float]] | None = None
    rope_inv_freq_source: dict | None = None
    rope_attention_factor: float | int | None = None
    rope_attention_factors: list[float] | None = None
    softmax_scale: float | int | None = None
    q_bias: bool = False
    kv_a_bias: bool = False
    o_bias: bool = False
    latent_norm: str = "rms_norm"
    latent_code: dict | list | None = None

    def __post_init__(self, **kwargs) -> None:
        if getattr(self, "attention_bias", False):
            self.q_bias = self.kv_a_bias = self.o_bias = True
        # Engines size their latent cache by `head_dim`; the body reads neither once its attention is replaced.
        self.head_dim = self.kv_lora_rank + self.qk_rope_head_dim
        self.num_key_value_heads = self.num_attention_heads
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        super().__post_init__(**kwargs)
        # A plan may name no module that the model lacks.
        absent = [".q_b_proj" if self.q_lora_rank is None else ".q_proj"]
        if not self.maps_queries_by_head:
            absent += [".q_head_proj", ".q_head_proj.weight"]
        self.base_model_tp_plan: dict[str, str] = {
            name: style for name, style in self.base_model_tp_plan.items() if not name.endswith(tuple(absent))
        }
        if "auto_map" not in self.__dict__:
            self.auto_map = dict(self.model_auto_map)

    @property
    def maps_queries_by_head(self) -> bool:
        """Whether attention has a ``q_head_proj``."""
        return self.q_head_dim is not None

    @property
    def attention_softcap(self) -> float | None:
        """Scores become ``softcap * tanh(scores / softcap)``; None where the body has no such field."""
        return None

    @property
    def attention_sinks(self) -> bool:
        """Whether every head has a logit that takes its share of the softmax."""
        return False

    def validate_rope(self) -> None:
        """As the body's, over the channels that are rotated: `head_dim` is here the width of the cache."""
        rotary = copy.copy(self)
        rotary.head_dim = self.qk_rope_head_dim
        super(MLAConfigMixin, rotary).validate_rope()

    def validate_mla(self) -> None:
        """Raises `ValueError` with field, value and limit. Runs with every construction (``@strict``)."""
        if self.kv_lora_rank < 1:
            raise ValueError(f"kv_lora_rank is {self.kv_lora_rank}; it must be at least 1.")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}; it must be at least 1, or None for a full q_proj.")
        if self.q_head_dim is not None and (self.q_head_dim < 1 or self.q_lora_rank is not None):
            raise ValueError(
                f"q_head_dim is {self.q_head_dim} beside q_lora_rank {self.q_lora_rank}; it must be at least 1 and is "
                "for a full q_proj, or None."
            )
        if self.qk_rope_head_dim < 0 or self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even and not negative.")
        if self.qk_nope_head_dim < 0 or self.qk_nope_head_dim + self.qk_rope_head_dim == 0:
            raise ValueError(
                f"qk_nope_head_dim is {self.qk_nope_head_dim} beside qk_rope_head_dim {self.qk_rope_head_dim}; "
                "it must not be negative, and a head needs at least one query channel."
            )
        if self.v_head_dim < 1:
            raise ValueError(f"v_head_dim is {self.v_head_dim}; it must be at least 1.")
        if self.latent_norm not in ("rms_norm", "identity"):
            raise ValueError(f"latent_norm is {self.latent_norm!r}; it must be 'rms_norm' or 'identity'.")
        if getattr(self, "use_bidirectional_attention", False):
            raise ValueError("use_bidirectional_attention is True; latents are attended to causally only.")
        self._validate_per_layer("kv_lora_ranks", self.kv_lora_ranks, self.kv_lora_rank)
        self._validate_per_layer("qk_nope_head_dims", self.qk_nope_head_dims, self.qk_nope_head_dim)
        self._validate_per_layer("qk_rope_head_dims", self.qk_rope_head_dims, self.qk_rope_head_dim)
        for layer in range(self.num_hidden_layers):
            if self.layer_qk_nope_head_dim(layer) + self.layer_qk_rope_head_dim(layer) == 0:
                raise ValueError(f"layer {layer} has no un-rotated and no rotary channels; a head needs at least one.")
        self._validate_rope_rows()
        self._validate_latent_code()

    def _validate_latent_code(self) -> None:
        written = self.latent_code
        if isinstance(written, list) and len(written) != self.num_hidden_layers:
            raise ValueError(f"latent_code has {len(written)} entries for {self.num_hidden_layers} layers.")
        for layer in range(self.num_hidden_layers):
            try:
                code = self.layer_latent_code(layer)
                if code is not None:
                    code.check_widths(self.layer_kv_lora_rank(layer), self.layer_qk_rope_head_dim(layer))
            except ValueError as error:
                raise ValueError(f"latent_code of layer {layer}: {error}") from error

    def _validate_per_layer(self, name: str, values: list[int] | None, largest: int) -> None:
        if values is None:
            return
        if len(values) != self.num_hidden_layers:
            raise ValueError(f"{name} has {len(values)} entries for {self.num_hidden_layers} layers.")
        if max(values) != largest:
            raise ValueError(f"{name} reaches {max(values)}, but {name[:-1]} is {largest}; it must be the largest.")
        if name == "kv_lora_ranks" and min(values) < 1:
            raise ValueError(f"kv_lora_ranks contains {min(values)}; every rank must be at least 1.")
        if name == "qk_nope_head_dims" and min(values) < 0:
            raise ValueError(f"qk_nope_head_dims contains {min(values)}; no entry may be negative.")
        if name == "qk_rope_head_dims" and any(value < 0 or value % 2 for value in values):
            raise ValueError(f"qk_rope_head_dims is {values}; every entry must be even and not negative.")

    def _validate_rope_rows(self) -> None:
        rows = self.rope_inv_freq
        if rows is None:
            if set(self.qk_rope_head_dims or ()) - {0, self.qk_rope_head_dim}:
                raise ValueError("qk_rope_head_dims needs rope_inv_freq: the frequencies of each layer's channels.")
            if self.rope_attention_factor is not None or self.rope_attention_factors is not None:
                raise ValueError(
                    "rope_attention_factor needs rope_inv_freq; without it the factor is that of rope_parameters."
                )
            if self.rope_long_inv_freq is not None:
                raise ValueError("rope_long_inv_freq needs rope_inv_freq: the frequencies of shorter texts.")
            return
        if self.rope_long_inv_freq is not None:
            if list(map(len, self.rope_long_inv_freq)) != list(map(len, rows)):
                raise ValueError("rope_long_inv_freq must have as many rows and frequencies as rope_inv_freq.")
            if "original_max_position_embeddings" not in self.rope_parameters:
                raise ValueError(
                    "rope_long_inv_freq needs original_max_position_embeddings in rope_parameters: the length beyond "
                    "which it is used."
                )
        if self.rope_attention_factors is not None and {len(rows), len(self.rope_attention_factors)} != {
            self.num_hidden_layers
        }:
            raise ValueError(
                f"rope_attention_factors has {len(self.rope_attention_factors)} entries beside {len(rows)} rows of "
                f"rope_inv_freq; both must have {self.num_hidden_layers}, one for each layer."
            )
        source = self.rope_inv_freq_source
        if source is not None and not source.keys() >= {"head_dim", "rope_parameters"}:
            raise ValueError(f"rope_inv_freq_source is {source}; it must name head_dim and rope_parameters.")
        if len(rows) not in (1, self.num_hidden_layers):
            raise ValueError(
                f"rope_inv_freq has {len(rows)} rows; it must have 1, or {self.num_hidden_layers}, one for each layer."
            )
        for layer in range(self.num_hidden_layers):
            row, width = rows[layer % len(rows)], self.layer_qk_rope_head_dim(layer)
            if 2 * len(row) != width:
                raise ValueError(
                    f"rope_inv_freq has {len(row)} frequencies for layer {layer}; "
                    f"its {width} rotary channels need {width // 2}."
                )

    def layer_kv_lora_rank(self, layer_idx: int) -> int:
        """Width of the latent that layer ``layer_idx`` caches."""
        return self.kv_lora_ranks[layer_idx] if self.kv_lora_ranks is not None else self.kv_lora_rank

    def layer_qk_nope_head_dim(self, layer_idx: int) -> int:
        """Un-rotated query/key channels of a head of layer ``layer_idx``."""
        return self.qk_nope_head_dims[layer_idx] if self.qk_nope_head_dims is not None else self.qk_nope_head_dim

    def layer_qk_rope_head_dim(self, layer_idx: int) -> int:
        """Width of the rotary key that layer ``layer_idx`` caches."""
        return self.qk_rope_head_dims[layer_idx] if self.qk_rope_head_dims is not None else self.qk_rope_head_dim

    def layer_latent_code(self, layer_idx: int) -> LatentCode | None:
        """The code in which layer ``layer_idx`` caches; None for the model's precision."""
        written = self.latent_code[layer_idx] if isinstance(self.latent_code, list) else self.latent_code
        return None if written is None else LatentCode.from_dict(written)

    def cache_bytes_per_token(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that all layers together cache for one token of one sequence, behind the first tokens of a code.

        Args:
            dtype: of what is not coded; by default the configuration's, or bfloat16 where it names none.
        """
        dtype = dtype or getattr(self, "dtype", None) or torch.bfloat16
        total = 0
        for layer in range(self.num_hidden_layers):
            code = self.layer_latent_code(layer)
            width = self.layer_kv_lora_rank(layer) + self.layer_qk_rope_head_dim(layer)
            total += width * dtype.itemsize if code is None else code.nbytes
        return total


def latent_widths(config: PreTrainedConfig, layer_idx: int) -> tuple[int, int]:
    """``kv_lora_rank`` and ``qk_rope_head_dim`` of a layer, by this library's configuration or by a native model's."""
    if hasattr(config, "layer_kv_lora_rank"):
        return config.layer_kv_lora_rank(layer_idx), config.layer_qk_rope_head_dim(layer_idx)
    layer = config.per_layer_config[layer_idx]
    return layer.kv_lora_rank, layer.qk_rope_head_dim


def is_coded(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration, whosever it is, caches in few bits unless it is told otherwise."""
    return getattr(config, "latent_code", None) is not None


def layer_code(config: PreTrainedConfig, layer_idx: int, latent_bits: int | None) -> LatentCode | int | None:
    """The code in which a cache keeps a layer: the configuration's, or `uniform_code` of ``latent_bits``, where given.

    Returns:
        The code, or the bits of a uniform one, whatever the layer's widths are; None for the model's precision.
    """
    check_latent_bits(latent_bits)
    if latent_bits is not None:
        return None if latent_bits == EXACT else latent_bits
    own = getattr(config, "layer_latent_code", None)
    return None if own is None else own(layer_idx)
