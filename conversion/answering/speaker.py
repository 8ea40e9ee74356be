"""A loaded checkpoint that answers: through its chat template where it has one, else by going on with the text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, TextStreamer
from typing_extensions import override

from modeling_mla.cache_mla import LatentCache
from modeling_mla.transformers_seams_mla import cache_argument

from ..checkpoint.location import locate
from ..devices.choice import chosen_device, free_bytes
from ..errors import ConversionError
from ..evaluation.loading import load_model
from ..sources import is_mla

Turn = dict[str, str]
"""A message of a conversation: its role and its content."""


@dataclass
class Answer:
    """What has come so far.

    ``tokens`` are those of the answer; ``cache_bytes`` what the cache holds of prompt and answer, ``cached`` how many
    tokens that are. ``seconds`` have passed since the first token.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    cache_bytes: int = 0
    cached: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first one, which waits for the prompt to be read; 0 before there are any."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds else 0.0


class Speaker:
    """A model with its tokenizer, in the type of its weights.

    Args:
        model: a folder, a ``.gguf`` file or a Hub id.
        device: see `chosen_device`.

    Raises:
        ConversionError: it cannot be found or loaded, or does not fit into memory.
    """

    def __init__(self, model: str, device: str) -> None:
        location, chosen = locate(model), chosen_device(device)
        config = location.config()
        self.tokenizer = location.tokenizer()
        self._latent = is_mla(config)
        dtype = config.get_text_config(decoder=True).dtype or torch.float32
        stored = sum(file.stat().st_size for file in location.folder.glob("*.safetensors"))
        if stored > free_bytes(chosen):
            raise ConversionError(
                f"{model} takes {stored / 1e9:.1f} GB, and {free_bytes(chosen) / 1e9:.1f} GB of memory are free on "
                f"{chosen}; choose another --device."
            )
        self._model = load_model(location, chosen, dtype)

    @property
    def converses(self) -> bool:
        """Whether it knows what was said before: it has a chat template."""
        return self.tokenizer.chat_template is not None

    @torch.inference_mode()
    def answer(
        self, turns: Sequence[Turn], most: int, tell: Callable[[Answer], None] = lambda _: None, *, greedy: bool = False
    ) -> Answer:
        """Answers the last of ``turns``.

        Args:
            turns: of the conversation; only the last one is read by a model that does not converse.
            most: tokens of the answer.
            tell: is shown the answer whenever there is more of it.
            greedy: always the most likely token, instead of what the checkpoint's generation defaults say.

        Raises:
            ConversionError: the conversation is longer than the model's context.
        """
        prompt = self._ids(turns).to(self._model.device)
        context = self._model.config.get_text_config(decoder=True).max_position_embeddings
        if prompt.shape[1] >= context:
            raise ConversionError(
                f"{prompt.shape[1]} tokens were said, and the model's context is {context}; begin anew."
            )
        config = self._model.config
        cache = LatentCache(config=config) if self._latent else DynamicCache(config=config)
        answer = Answer()
        streamer = _Streamer(self, answer, cache, tell)
        sampling = {"do_sample": False} if greedy else {}
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(most, context - prompt.shape[1]),
            num_beams=1,
            streamer=streamer,
            **sampling,
            **cache_argument(cache),
        )
        return answer

    def _ids(self, turns: Sequence[Turn]) -> Tensor:
        if not self.converses:
            return self.tokenizer(turns[-1]["content"], return_tensors="pt")["input_ids"]
        found = self.tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return found["input_ids"]


class _Streamer(TextStreamer):
    """Writes what comes into an answer."""

    def __init__(self, speaker: Speaker, answer: Answer, cache: Cache, tell: Callable[[Answer], None]) -> None:
        super().__init__(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._answer, self._cache, self._tell = answer, cache, tell
        self._first: float | None = None

    @override
    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            now = time.monotonic()
            self._first = now if self._first is None else self._first
            self._answer.seconds = now - self._first
            self._answer.tokens += value.flatten().tolist()
            self._answer.cached, self._answer.cache_bytes = self._cache.get_seq_length(), cache_bytes(self._cache)
        super().put(value)

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._answer.text += text
        self._tell(self._answer)


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds, of latents or of keys and values."""
    if isinstance(cache, LatentCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
