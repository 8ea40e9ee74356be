"""Supervised fine-tuning of a converted checkpoint on conversations by TRL, several packed into a row.

python examples/training/sft.py OUT chats.jsonl tuned --steps 200     # rows of {"messages": [{"role", "content"}, ...]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint with a chat template.")],
    chats: Annotated[Path, typer.Argument(help="A JSON file of conversations, one a line.")],
    output: Annotated[Path, typer.Argument(help="Folder of the tuned model.")],
    steps: Annotated[int, typer.Option(help="Of one row each.")] = 200,
    window: Annotated[int, typer.Option(help="Tokens in a row, which holds several conversations.")] = 1024,
) -> None:
    """Positions start again with every conversation of a row, and attention does not look across."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=1,
        max_length=window,
        packing=True,
        learning_rate=2e-5,
        bf16=torch.cuda.is_available(),
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
    )
    rows = load_dataset("json", data_files=str(chats), split="train")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    typer.run(main)
