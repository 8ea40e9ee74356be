"""The Trainer that distils a teacher into a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from typing_extensions import override

from .losses import logit_loss
from .pace import Pace

BETAS = (0.9, 0.98)


class DistillationTrainer(Trainer):
    """Trainer whose loss, in training and in evaluation, is the divergence from a teacher."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()
        self.half = multiplies_bfloat16(self.args.device)

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.half):
            loss, outputs = logit_loss(self.teacher, model, inputs)
        return (loss, outputs) if return_outputs else loss

    @override
    def prediction_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


class OneDevice(TrainingArguments):
    """Arguments of a training on ``device``, whatever others there are."""

    def __init__(self, device: torch.device, **arguments: Any) -> None:
        self._chosen = device
        super().__init__(use_cpu=device.type == "cpu", dataloader_pin_memory=device.type == "cuda", **arguments)

    @property
    @override
    def device(self) -> torch.device:
        # Accelerate, which places the batches, looks there when Transformers makes its state.
        with patch_environment(accelerate_torch_device=str(self._chosen)):
            _ = super().device
        return self._chosen

    @property
    @override
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def make_trainer(
    student: nn.Module,
    teacher: PreTrainedModel,
    groups: list[dict[str, Any]],
    *,
    training: Tensor,
    validation: Tensor,
    pace: Pace,
    seed: int,
    device: torch.device,
    work: Path,
) -> DistillationTrainer:
    """A trainer that keeps the best state by validation divergence, and has it loaded when it ends.

    Args:
        student: learns with those of its parameters that are in ``groups``.
        teacher: gives the logits that the student shall give.
        groups: parameter groups of the optimizer, each with its own rate.
        training: token ids ``[N, S]`` of the windows that are learnt from.
        validation: token ids ``[M, S]`` of the windows by which states are compared.
        pace: tells when to evaluate, to save and to end, and by what the rates are multiplied.
        seed: of the order of the windows.
        device: of both models.
        work: where states are kept meanwhile, an absolute path.
    """
    arguments = OneDevice(
        device,
        output_dir=str(work),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        max_steps=pace.steps or 10**9,
        # Evaluations and saves come when the pace says so.
        eval_strategy="steps",
        eval_steps=10**9,
        save_strategy="steps",
        save_steps=10**9,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        data_seed=seed,
    )
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    trainer = DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=[{"input_ids": window} for window in training],
        eval_dataset=[{"input_ids": window} for window in validation],
        callbacks=[pace],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, pace.rate)),
        teacher=teacher,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
