"""What a healing gained: a converted checkpoint before and after, beside the source.

Perplexity on a text; KL and equal most likely tokens on the held-out default texts and on text of a kind that was never
learnt from; the source's greedy answers to short prompts, and recall. Nothing here is text that a healing reads.

    mla heal out --teacher MODEL --minutes 60 --out healed
    python examples/benchmarks/healing.py MODEL out healed --text test.txt
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rows import print_rows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conversion.checkpoint.location import locate
from conversion.devices.choice import AUTO, chosen_device
from conversion.evaluation.loading import load_model
from conversion.evaluation.recall import SAMPLES, measure_recall
from conversion.evaluation.scores import ROWS, Score, Scores, perplexity
from conversion.evaluation.verify import text_windows
from conversion.forward.products import fast_float32
from conversion.progress import counting, shown_progress
from conversion.text.default_mix import calibration_documents, evaluation_texts
from modeling_mla.configuration_mla import is_coded

WINDOW = 1024
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 100, 24, 16
_UNSEEN = "Bulgarian"
"""A language that a model with an English tokenizer is not healed on."""


def texts_of(tokenizer: PreTrainedTokenizerBase, unseen: Path | None, windows: int) -> dict[str, torch.Tensor]:
    """Windows ``[N, S]`` of every domain, by its name; the last is of the kind that was never learnt from."""
    texts = evaluation_texts(tokenizer)
    name = _UNSEEN if unseen is None else unseen.name
    if name in texts:
        raise typer.BadParameter(f"the model is healed on {name}; give a text of another kind by --unseen.")
    texts[name] = "".join(calibration_documents(name, tokenizer)) if unseen is None else unseen.read_text("utf-8")
    return {domain: text_windows(text, domain, tokenizer, WINDOW, windows) for domain, text in texts.items()}


@fast_float32()
@torch.inference_mode()
def score(source: PreTrainedModel, model: PreTrainedModel, name: str, windows: torch.Tensor) -> Score:
    """KL and agreement; a coded cache is read from."""
    sums = Scores()
    for window in windows:
        expected = source(window[None], use_cache=False).logits[0, :-1]
        found = model(window[None], use_cache=is_coded(model.config)).logits[0, :-1]
        for parts in zip(expected.split(ROWS), found.split(ROWS), window[1:].split(ROWS), strict=True):
            sums.add(*parts)
    return sums.result(name, *windows.shape)


@fast_float32()
@torch.inference_mode()
def answers(model: PreTrainedModel, texts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[PROMPTS, ANSWER_TOKENS]``: greedy continuations of pieces of the windows, of all domains alike."""
    rows = torch.cat([windows[:, : WINDOW // PROMPT_TOKENS * PROMPT_TOKENS] for windows in texts.values()])
    prompts = rows.reshape(-1, PROMPT_TOKENS)
    prompts = prompts[torch.linspace(0, len(prompts) - 1, PROMPTS).long()]
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=ANSWER_TOKENS,
        max_new_tokens=ANSWER_TOKENS,
    )
    return written[:, PROMPT_TOKENS:]


def main(
    source: Annotated[str, typer.Argument(help="The model that the others were made from.")],
    checkpoints: Annotated[list[str], typer.Argument(help="Before and after, and more.")],
    text: Annotated[Path, typer.Option(help="The text to report perplexity on.")],
    unseen: Annotated[Path | None, typer.Option(help="Of a kind never learnt from. [default: Bulgarian]")] = None,
    windows: Annotated[int, typer.Option(help="Of 1024 tokens, of the text; of each domain at most 8.")] = 32,
    context: Annotated[int, typer.Option(help="Of recall, in tokens.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of recall.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
) -> None:
    """Measures; see the module."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    device, location = chosen_device(AUTO), locate(source)
    tokenizer, original = location.tokenizer(), load_model(location, device)
    read = text_windows(text.read_text("utf-8"), text.name, tokenizer, WINDOW, windows)
    texts = {name: found.to(device) for name, found in texts_of(tokenizer, unseen, min(windows, 8)).items()}
    expected, own = answers(original, texts), perplexity(original, read)
    rows: list[dict[str, Any]] = []
    with shown_progress() as progress:
        for name in checkpoints:
            model = load_model(locate(name), device)
            with counting(progress, name, len(read) + len(texts) + 2 * SAMPLES) as step:
                row: dict[str, Any] = {
                    "checkpoint": Path(name).name,
                    "perplexity": perplexity(model, read, step),
                    "source": own,
                }
                for domain, found in texts.items():
                    scored = score(original, model, domain, found)
                    row |= {f"KL {domain}": scored.kl, f"top-1 {domain}": scored.top1_agreement}
                    step()
                same = (answers(model, texts) == expected).all(1)
                row["answers"] = f"{int(same.sum())} of {PROMPTS}"
                recall = measure_recall(original, model, tokenizer, context, seed, step)
                row |= {"needle": recall.needle, "copy": recall.copy, "copy of the source": recall.copy_source}
            rows.append(row)
    print_rows(rows, as_json)


if __name__ == "__main__":
    typer.run(main)
