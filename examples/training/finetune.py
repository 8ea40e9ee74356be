"""Fine-tunes a converted checkpoint on a text with Trainer, as any model of Transformers.

python examples/training/finetune.py OUT text.txt tuned --steps 200
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


def main(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub id.")],
    text: Annotated[Path, typer.Argument(help="A text file to learn.")],
    output: Annotated[Path, typer.Argument(help="Folder of the tuned model.")],
    steps: Annotated[int, typer.Option(help="Of one window each.")] = 200,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    rate: Annotated[float, typer.Option(help="Learning rate at its highest.")] = 2e-5,
) -> None:
    """Trains all weights on windows of the text, packed without padding, and saves model and code."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    windows = [{"input_ids": ids[start : start + window]} for start in range(0, len(ids) - window, window)]
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=windows, data_collator=collator)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    typer.run(main)
