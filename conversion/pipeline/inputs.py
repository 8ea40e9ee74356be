"""What a conversion reads and where it writes, opened and checked before anything is made."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint.atomic import require_space
from ..checkpoint.paths import require_free
from ..errors import CalibrationError, SourceError, blaming, one_line
from ..planning.plan import ConversionPlan
from ..reporting.report import calibration_name
from ..sources import SourceModel
from ..text.default_mix import template_failure
from ..text.windows import load_windows
from .work.partial_output import beside, require_absent

_SAMPLE = "Aa 0.\n"


def open_inputs(plan: ConversionPlan, source: SourceModel, progress: Progress) -> PreTrainedTokenizerBase:
    """The source's tokenizer, once the output, the disk and it have been found fit.

    What is no obstacle, but should be known, is printed.

    Raises:
        ConversionError: the conversion cannot succeed; nothing was written.
    """
    output, work = plan.recipe.output, beside(plan.recipe.output)
    check_output(output)
    if not work.exists():
        # Where it exists, so much of the disk is taken already.
        require_space(work.absolute().parent, plan.costs.disk_bytes)
    tokenizer = source.location.tokenizer()
    check_vocabulary(tokenizer, source)
    with blaming(SourceError, f"the tokenizer of {source.location.model} tokenises no text"):
        tokenizer(_SAMPLE)
    failure = template_failure(tokenizer) if tokenizer.chat_template is not None else None
    if failure is not None:
        note = f"note: the chat template {failure}; the default text goes without conversations."
        progress.console.print(one_line(note), soft_wrap=True)
    return tokenizer


def check_output(output: Path) -> None:
    """Raises `OutputError` where ``output`` exists, or cannot be made under its name."""
    work = beside(output)
    require_free(output, companions=[work.name, f"{work.name}.lock"])
    require_absent(output)


def calibration_windows(plan: ConversionPlan, source: SourceModel, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Token ids ``[N, S]`` of the calibration text; None where the method needs none, or the source will write it."""
    if not plan.windows or plan.recipe.is_self_written:
        return None
    recipe = plan.recipe
    windows = load_windows(recipe.calibration, tokenizer, plan.window, plan.windows * plan.window, recipe.seed)
    check_ids(windows, calibration_name(recipe.calibration), tokenizer, source)
    return windows


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, source: SourceModel) -> None:
    """Raises `SourceError` where a token has no row in the embedding.

    Tokens that were added to the vocabulary may lack one: text meets them by their name alone.
    """
    added = tokenizer.get_added_vocab()
    ids = {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
    token = max(ids, key=ids.__getitem__, default=None)
    if token is not None and ids[token] >= source.config.vocab_size:
        raise _without_row(source, token, ids[token])


def check_ids(windows: Tensor, text: str, tokenizer: PreTrainedTokenizerBase, source: SourceModel) -> None:
    """Raises `CalibrationError` where token ids in ``windows [N, S]`` of ``text`` have no row in the embedding."""
    largest = int(windows.max())
    if largest >= source.config.vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise CalibrationError(f"text {text!r}: {_without_row(source, str(token), largest)}")


def _without_row(source: SourceModel, token: str, index: int) -> SourceError:
    return SourceError(
        f"the tokenizer of {source.location.model} has token {token!r} with id {index}, but the embedding has "
        f"{source.config.vocab_size} rows; give the tokenizer that belongs to the weights."
    )
