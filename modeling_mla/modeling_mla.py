"""What turns a Transformers body into an MLA model: its attention, its rotary table, its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from typing_extensions import override

from .backends_mla import checked_backend
from .cache_mla import LatentCache
from .cache_static_mla import StaticLatentCache
from .first_tokens_mla import leading_padding
from .latent_attention_mla import LatentAttention
from .paged_mla import LatentBatchingManager
from .peft_mla import register_peft_targets
from .transformers_seams_mla import (
    CACHE_NAME,
    CACHE_NAMES,
    ContinuousMixin,
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    LlamaRMSNorm,
    get_checkpoint_conversion_mapping,
    init,
    is_checkpoint_code,
    names_used,
    register_checkpoint_conversion_mapping,
    with_globals,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Body
else:
    _Body = object

_QUANTIZED_BITS = 8
"""Of ``cache_implementation="quantized"``, where nothing else says how many."""


def built_with(body_class: type[nn.Module], **replacements: Callable[..., Any]) -> Callable:
    """The constructor of a body's class, for which other classes stand where it names its own.

    The body then builds itself, whatever it is made of, and never allocates an attention that would be thrown away:
    that of an 8-billion-parameter model, with MLA's head size, takes more memory than the model. ``replacements`` go by
    the names that the constructor looks up in its module.

    Raises:
        TypeError: the constructor does not look one of them up, so nothing would be replaced.
    """
    absent = sorted(set(replacements) - names_used(body_class.__init__))
    constructor = with_globals(body_class.__init__, **replacements)
    if absent or constructor is None:
        raise TypeError(f"{body_class.__name__} does not build {', '.join(absent) or 'itself in a plain function'}.")
    return constructor


def add_latent_cache(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a base model's ``forward``, with a `LatentCache` where its body would make a stock one.

    A cache under the name of a later release gets the name of the installed one, whose body would know nothing of it.
    """
    newest = CACHE_NAMES[0]
    # Pages, which releases before 5.24 pass under that name, are none of the body's either.
    if newest != CACHE_NAME and isinstance(kwargs.get(newest), Cache):
        kwargs = {name: value for name, value in kwargs.items() if name != newest} | {CACHE_NAME: kwargs[newest]}
    use_cache = kwargs.get("use_cache")
    use_cache = model.config.use_cache if use_cache is None else use_cache
    checkpointing = getattr(model, "gradient_checkpointing", False) and model.training
    given = any(kwargs.get(name) is not None for name in CACHE_NAMES)
    # Transformers' models take the cache as fourth positional argument.
    if use_cache and not checkpointing and not given and len(args) < 4:
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        kwargs[CACHE_NAME] = LatentCache(config=model.config, latent_bits=getattr(model, "latent_bits", None))
    cache: Any = kwargs.get(CACHE_NAME)
    inputs = kwargs.get("input_ids", args[0] if args else None)
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if hasattr(cache, "skip_padding") and inputs is not None:
        padding = leading_padding(kwargs, inputs.shape[:2], cache.get_seq_length())
        if padding is not None:
            cache.skip_padding(padding)
    return args, kwargs


def with_latent_cache(forward: Callable) -> Callable:
    """A base model's ``forward`` after `add_latent_cache`."""

    @functools.wraps(forward)
    def wrapped(self: PreTrainedModel, *args, **kwargs):
        args, kwargs = add_latent_cache(self, args, kwargs)
        return forward(self, *args, **kwargs)

    return wrapped


class MLAPreTrainedMixin(_Body):
    """First base of a family's `PreTrainedModel`: latent caches for generation, and the choice of route and backend."""

    config: PreTrainedConfig
    latent_bits: int | None = None
    """Of the caches that `generate` makes, where `enable_absorbed_attention` was asked for a code."""

    @override
    def post_init(self) -> None:
        register_peft_targets(self.config.model_type)
        self.set_attention_backend("auto")
        super().post_init()

    @override
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaRMSNorm):
            # Bodies whose norms are ``1 + weight`` zero the weight of any norm, by its name.
            init.ones_(module.weight)
        init_weights: Callable | None = getattr(module, "init_mla_weights", None)
        if init_weights is not None:
            init_weights(self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the body: Transformers looks for experts in the file of a class, and they are in the body's."""
        body: Any = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return body._can_set_experts_implementation()

    @override
    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs
    ) -> None:
        """Puts latent caches where Transformers makes its own; a cache that the user gave stays.

        ``cache_config={"latent_bits": n}`` chooses the code, as `LatentCache` does.
        """
        given = model_kwargs.get(CACHE_NAME)
        wanted = generation_config.cache_config or {}
        bits = wanted.get("latent_bits", self.latent_bits)
        quantized = generation_config.cache_implementation == "quantized"
        if given is None and quantized and not wanted.get("backend"):
            if bits is None and getattr(self.config, "latent_code", None) is None:
                bits = _QUANTIZED_BITS
            cache: Cache = LatentCache(config=self.config, latent_bits=bits)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            made = model_kwargs.get(CACHE_NAME)
            if given is not None or made is None or type(made) not in (DynamicCache, StaticCache):
                return
            if type(made) is DynamicCache:
                cache = LatentCache(config=self.config, offloading=made.offloading, latent_bits=bits)
            else:
                cache = StaticLatentCache(self.config, made.get_max_length(), made.offloading, latent_bits=bits)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache

    # As Transformers', with pages of latents: `generate_batch` and ``transformers serve`` come here.
    init_continuous_batching = with_globals(
        ContinuousMixin.init_continuous_batching, ContinuousBatchingManager=LatentBatchingManager
    )

    def set_attention_route(self, route: str) -> None:
        """Forces a route in every layer, or gives the choice back.

        Args:
            route: ``"auto"``, ``"absorbed"`` or ``"expanded"``.

        Raises:
            ValueError: it is none of these.
        """
        if route not in ("auto", "absorbed", "expanded"):
            raise ValueError(f"route is {route!r}; it must be 'auto', 'absorbed' or 'expanded'.")
        for module in self.modules():
            if isinstance(module, LatentAttention):
                module.route = route

    def set_attention_backend(self, backend: str) -> None:
        """Names the backend of the absorbed route in every layer, or gives the choice back.

        ``attn_implementation`` goes on naming the function of the expanded route, so these are two settings.

        Args:
            backend: ``"auto"`` or a name that ``mla backends`` lists. ``"auto"`` is what ``MODELING_MLA_BACKEND``
                says where that is set.

        Raises:
            ValueError: there is no backend of that name, or it cannot be used on this machine.
        """
        backend = checked_backend(backend)
        for module in self.modules():
            if isinstance(module, LatentAttention):
                module.backend = backend


class _BodysEmbeddings:
    """Transformers' generic heads call body and embedding as Llama does; the body has names of its own."""

    base_model: PreTrainedModel

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.set_input_embeddings(value)


def generic_heads(pretrained_class: type[PreTrainedModel]) -> tuple[type, ...]:
    """Transformers' generic heads on a family: sequence classification, token classification, question answering."""
    family = pretrained_class.__name__.removesuffix("PreTrainedModel")
    return tuple(
        type(
            f"{family}{generic.__name__.removeprefix('Generic')}",
            (_BodysEmbeddings, generic, pretrained_class),
            {
                "__module__": pretrained_class.__module__,
                "__doc__": f"`{family}Model` with Transformers' `{generic.__name__}` on top.",
                "base_model_prefix": pretrained_class.base_model_prefix,
            },
        )
        for generic in (GenericForSequenceClassification, GenericForTokenClassification, GenericForQuestionAnswering)
    )


def register_family(config_class: type[PreTrainedConfig], *model_classes: Any) -> None:
    """Makes a family known to AutoConfig and the AutoModel classes, and lets checkpoints carry its code.

    Runs when the family's file is imported, from the package or from a checkpoint's copy of it. AutoConfig learns only
    of the package: a class that it knows by model type serves every checkpoint of the process, whatever code they
    carry. The AutoModel classes go by the configuration's class, and every copy has its own.

    Args:
        config_class: named ``<Family>Config``.
        model_classes: named ``<Family>Model`` and ``<Family>For<Task>``, for ``AutoModel`` and ``AutoModelFor<Task>``.
    """
    family = config_class.__name__.removesuffix("Config")
    file = config_class.__module__.rpartition(".")[2]
    config_class.model_auto_map = {"AutoConfig": f"{file}.{config_class.__name__}"}
    if not is_checkpoint_code(config_class.__module__):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class()
    body: Any = next(base for base in config_class.__mro__[1:] if getattr(base, "model_type", ""))
    _store_as(config_class.model_type, [body.model_type])
    for model_class in model_classes:
        task = model_class.__name__.removeprefix(family).removeprefix("Model")
        auto_class = getattr(transformers, f"AutoModel{task}")
        config_class.model_auto_map[auto_class.__name__] = f"{file}.{model_class.__name__}"
        auto_class.register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
        _store_as(model_class.__name__, [base.__name__ for base in model_class.__mro__[1:]])


def _store_as(name: str, bodies: list[str]) -> None:
    """Weights that pass through a conversion stay stored as the body's are: experts, for one, each by itself.

    Args:
        name: a model type or class, by which Transformers knows how weights are stored.
        bodies: the same of the body; the first one counts that is known.
    """
    for body in bodies:
        stored = get_checkpoint_conversion_mapping(body)
        if stored is not None:
            register_checkpoint_conversion_mapping(name, stored, overwrite=True)
            return


__all__ = ["MLAPreTrainedMixin", "built_with", "generic_heads", "register_family", "with_latent_cache"]
