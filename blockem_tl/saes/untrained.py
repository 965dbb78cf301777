"""What SAELens's trainer is given: a fresh SAE, and a schedule."""

from typing import Any, Literal

from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata

Kind = Literal["topk", "batchtopk", "jumprelu"]


def untrained(kind: Kind, *, d_in: int, d_sae: int, k: int, site: str, model: str, device: str = "cpu") -> Any:
    """A fresh SAE of SAELens's training classes, for activations of width d_in: d_sae latents, k active at a token (JumpReLU finds its own
    number)."""
    common: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "device": device,
        "apply_b_dec_to_input": True,
        "normalize_activations": "expected_average_only_in",  # folded into the weights at the end of training
        "metadata": SAEMetadata(model_name=model, hook_name=site, prepend_bos=False),
    }
    if kind == "jumprelu":
        return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, l0_coefficient=1.0))
    kinds: dict[str, Any] = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }
    make, config_of = kinds[kind]
    return make(config_of(**common, k=k, rescale_acts_by_decoder_norm=True))


def schedule(
    steps: int,
    batch_size: int,
    learning_rate: float,
    *,
    device: str = "cpu",
    autocast: bool = False,
    warm_up: int | None = None,
    dead_after: int | None = None,
) -> SAETrainerConfig:
    """SAELens's settings: a short warm-up, and a linear decay to a tenth over the last quarter. A latent is dead after so many steps."""
    return SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        device=device,
        autocast=autocast,
        lr=learning_rate,
        lr_end=learning_rate / 10,
        lr_decay_steps=steps // 4,
        lr_warm_up_steps=min(100, steps // 10) if warm_up is None else warm_up,
        dead_feature_window=max(50, steps // 10) if dead_after is None else dead_after,
        n_batches_for_norm_estimate=20,
    )
