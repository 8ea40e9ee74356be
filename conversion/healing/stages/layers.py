"""``layers``: every block alone, on the hidden states that enter it in the teacher.

No gradient passes from block to block, so a block learns from a target of its own, and memory holds the intermediate
states of one at a time. This comes first in recipes that need few tokens: Zebra-Llama (arXiv 2505.17272), LoLCATs
(arXiv 2410.10254).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from ..pair import Pair, attention_names
from .base import Stage

_LEAST_GAIN = 0.01
"""Relative to the loss on held-out text: a stage that gains less from one evaluation to the next is over."""


class Layers(Stage):
    """Minimises the error of the attention output and that of the stream behind the block.

    Both are squared and relative to the squared norm of a token's stream behind the block in the teacher: the next norm
    sees errors so.
    """

    ends_early: ClassVar[bool] = True

    stage: Literal["layers"] = "layers"
    share: float = Field(default=0.2, gt=0)

    @override
    def losses(self, pair: Pair, ids: Tensor, each: Callable[[Tensor], None]) -> None:
        names = attention_names(pair.student)
        attended: list[Tensor] = []
        left: list[Tensor] = []
        with torch.no_grad(), ExitStack() as hooks:
            for name in names:
                hooks.enter_context(seen(pair.teacher.get_submodule(name), attended.append))
                hooks.enter_context(seen(block_of(pair.teacher, name), left.append))
            pair.teacher.base_model(input_ids=ids, use_cache=False)
        found: list[Tensor] = []

        def end_block(stream: Tensor, index: int) -> Tensor:
            energy = left[index].float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            errors = ((found.pop(), attended[index]), (stream, left[index]))
            each(torch.stack([((a.float() - b.float()).square().sum(-1) / energy).mean() for a, b in errors]).sum())
            return left[index]

        with ExitStack() as hooks:
            for index, name in enumerate(names):
                hooks.enter_context(seen(pair.student.get_submodule(name), found.append))
                block = block_of(pair.student, name)
                hooks.enter_context(seen(block, partial(end_block, index=index)))
            pair.student.base_model(**pair.student_arguments(ids))

    @override
    def is_done(self, held_out: Sequence[float]) -> bool:
        return len(held_out) > 1 and held_out[-1] > (1 - _LEAST_GAIN) * held_out[-2]


def block_of(model: nn.Module, attention: str) -> nn.Module:
    """The decoder layer that has an attention of that name."""
    return model.get_submodule(attention.rpartition(".")[0])


@contextmanager
def seen(module: nn.Module, look: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within it ``look`` is called with what the module gives, and may give a tensor to take its place."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        other = look(states)
        if other is None:
            return None
        return (other, *output[1:]) if isinstance(output, tuple) else other

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
