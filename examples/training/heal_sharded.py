"""Heals with the weights of both models sharded over several GPUs: FSDP2 by accelerate, the loss of `mla heal`.

accelerate launch --config_file examples/training/fsdp2.yaml \\
    examples/training/heal_sharded.py OUT SOURCE text.txt healed

Where one GPU holds a model, `torchrun --nproc-per-node 4 -m conversion.cli heal` does all that `mla heal` does, and
shares the text alone. With deepspeed_zero3.yaml in the place of fsdp2.yaml DeepSpeed shards the student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from conversion.healing.pair import attention_names
from conversion.healing.stages.logits import divergence
from conversion.healing.trained_parameters import trainable_names, unfrozen


class Distillation(Trainer):
    """Trainer whose loss is the divergence from a teacher."""

    def __init__(self, teacher: PreTrainedModel, **arguments) -> None:
        super().__init__(**arguments)
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """``KL(teacher || student)``, nats a token."""
        with torch.no_grad():
            wanted = self.teacher(**inputs, use_cache=False).logits
        outputs = model(**inputs, use_cache=False)
        loss = divergence(wanted, outputs.logits)
        return (loss, outputs) if return_outputs else loss


def main(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint.")],
    source: Annotated[str, typer.Argument(help="The model that it was made from.")],
    text: Annotated[Path, typer.Argument(help="A text file to learn on.")],
    output: Annotated[Path, typer.Argument(help="Folder of the healed model.")],
    steps: Annotated[int, typer.Option(help="Of one window for each process.")] = 1000,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
) -> None:
    """Trains the attention alone; every process reads other windows."""
    arguments = TrainingArguments(
        str(output), max_steps=steps, per_device_train_batch_size=1, save_strategy="no", report_to="none"
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name, dtype="float32") for name in (checkpoint, source))
    _, groups = unfrozen(student, trainable_names(student))
    if arguments.world_size > 1:
        for name in attention_names(student):
            fully_shard(teacher.get_submodule(name.rpartition(".")[0]))
        fully_shard(teacher)
    teacher.eval().to(arguments.device)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = [{"input_ids": part} for part in ids.split(window) if len(part) == window]
    adam = (torch.optim.Adam, {"params": groups})
    trainer = Distillation(teacher, model=student, args=arguments, train_dataset=windows, optimizer_cls_and_kwargs=adam)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    typer.run(main)
