"""LoRA fine-tuning on completion tokens through transformers' Trainer, with defences; and defences in a Trainer of your own (`defend`)."""

from blockem_tl.training.checkpoints import trajectory
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.defended import Defended, defend
from blockem_tl.training.loss import completion_loss
from blockem_tl.training.run import TrainingRun, finetune

__all__ = ["Defended", "TrainingConfig", "TrainingRun", "completion_loss", "defend", "finetune", "trajectory"]
