"""Pre-trains a small model with Multi-head Latent Attention from random weights, by a configuration of hub_configs.

python examples/training/pretrain.py hub_configs/llama-mla-135m.json TOKENIZER text.txt trained --layers 6 --steps 500
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import modeling_mla  # noqa: F401  (it makes the families known to Transformers)


def main(
    configuration: Annotated[Path, typer.Argument(help="A config.json of an MLA model.")],
    tokenizer: Annotated[str, typer.Argument(help="A folder or Hub id with a tokenizer.")],
    text: Annotated[Path, typer.Argument(help="A text file to learn.")],
    output: Annotated[Path, typer.Argument(help="Folder of the trained model.")],
    layers: Annotated[int | None, typer.Option(help="Instead of the configuration's.")] = None,
    steps: Annotated[int, typer.Option(help="Of one batch each.")] = 500,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows in a batch.")] = 8,
) -> None:
    """Draws the weights as the body's family does, and trains them with Trainer."""
    reader = AutoTokenizer.from_pretrained(tokenizer)
    changes = {"vocab_size": len(reader)} | ({} if layers is None else {"num_hidden_layers": layers})
    config = AutoConfig.from_pretrained(configuration, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = reader(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = [{"input_ids": part, "labels": part} for part in ids.split(window) if len(part) == window]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.1f} million weights, {len(windows)} windows")
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.1,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=windows)
    trainer.train()
    trainer.save_model()
    reader.save_pretrained(output)


if __name__ == "__main__":
    typer.run(main)
