"""Text that a model writes itself, in the domains and languages that it knows, where no other text is to be had.

Every window begins with one of several openings and is sampled from the model's own distribution, batched over a static
cache. A model with a chat template also writes conversations, the user's part included: their opening is what the
template puts before a user's first words (Magpie, arXiv 2406.08464, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..devices.choice import CPU
from .rendering import TemplateError, render

_OPENINGS = ("", "The ", "In ", "import ", "# ", "1. ", "How ", "\n\n")
"""Of prose, code, lists and questions, behind what begins a text; the first is nothing more."""
_CONVERSATIONS = 3
"""As many windows as so many openings, where there is a chat template."""
_USER = "\N{BLACK SMALL SQUARE}"
_BATCH = 32


@torch.inference_mode()
def self_written_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    count: int,
    seed: int,
    step: Callable[[int], None],
    beginnings: Tensor | None = None,
) -> Tensor:
    """Samples ``count`` windows of ``window`` tokens, ``[count, window]``, on the CPU.

    They are the same ones for the same seed and kind of device: each kind draws other random numbers.

    Args:
        model: a causal model that is loaded whole.
        tokenizer: its own.
        window: tokens in a window, the opening included.
        count: how many.
        seed: of the sampling.
        step: called with the number of windows that were written since the last call.
        beginnings: token ids ``[M, n]`` that windows begin with by turns; None for openings of several kinds.
    """
    given = _openings(tokenizer) if beginnings is None else beginnings.tolist()
    openings = [ids[:window] for ids in given]
    rows = [openings[number % len(openings)] for number in range(count)]
    written = []
    # PyTorch forks no other kind's.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, count, _BATCH):
            batch = rows[first : first + _BATCH]
            written.append(_continued(model, batch, window))
            step(len(batch))
    return torch.cat(written).cpu()


def _continued(model: PreTrainedModel, openings: list[list[int]], length: int) -> Tensor:
    """Continues openings to ``[B, length]``, beyond the end of a text or a turn as well."""
    longest, shortest, device = max(map(len, openings)), min(map(len, openings)), model.device
    padding = torch.tensor([longest - len(ids) for ids in openings], device=device)
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in openings], device=device)
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=length - shortest,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=True,
    )
    own, model.generation_config = model.generation_config, sampling
    try:
        mask = torch.arange(longest, device=device) >= padding[:, None]
        # Caches of Transformers begin on the default device.
        with CPU:
            texts = model.generate(ids, attention_mask=mask.long())
    finally:
        model.generation_config = own
    return texts.gather(1, padding[:, None] + torch.arange(length, device=device))


def _openings(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # A text begins with something: without a token for that, a model begins one where another one ended.
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _OPENINGS]
    openings = [[*([] if first is None else [first]), *ids] for ids in plain] + [
        _users_turn(tokenizer)
    ] * _CONVERSATIONS
    return [ids for ids in openings if ids]


def _users_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template puts before a user's first words; nothing where there is none, or it refuses."""
    if tokenizer.chat_template is None:
        return []
    try:
        conversation = [{"role": "user", "content": _USER}]
        (rendered,) = render(tokenizer.get_chat_template(), [conversation], tokenizer.special_tokens_map)
    except TemplateError:
        return []
    before, found, _ = rendered.partition(_USER)
    return tokenizer(before, add_special_tokens=False)["input_ids"] if found else []
