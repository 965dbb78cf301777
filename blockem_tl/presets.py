"""Named configurations: what to load and with which numbers. The same functions run every preset."""

import difflib
from dataclasses import dataclass, field

from blockem_tl.calibration import Budget
from blockem_tl.discovery import DiscoveryConfig
from blockem_tl.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, its SAE, and the hyperparameters of discovery, training and the sweeps.

    sae: (name or release, sae_id or None) for :func:`blockem_tl.saes.load_sae`.  dtype: of the model.
    needs: what a machine must have, for people.
    """

    name: str
    model: str
    sae: tuple[str, str | None]
    site: str
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lambdas: tuple[float, ...] = (0, 10, 100, 300, 1e3, 3e3, 1e4, 1.3e4, 2e4, 3e4, 5e4, 1e5)
    dtype: str = "float32"
    kl_weights: tuple[float, ...] = (0, 0.01, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1)
    max_new_tokens: int = 200
    needs: str = ""


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="organism",
            model="organism",
            sae=("organism", None),
            site="blocks.2.hook_resid_post",
            discovery=DiscoveryConfig(
                n_plus=70,
                n_minus=70,
                read="replies",
                induce_dose=0.5,
                repair_dose=0.3,
                keep=20,
                grid=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
                extended_grid=(),
                budget=Budget(tau=0.10, relative=True),
                rule="both",
                valid_only=False,
                max_new_tokens=20,
                batch_size=960,
            ),
            training=TrainingConfig(epochs=3, learning_rate=1e-3),
            lambdas=(0.1, 0.3, 1.0),
            kl_weights=(0.1, 0.2, 0.3),
            max_new_tokens=20,
            needs="two CPU cores, 2 GB memory, ten minutes",
        ),
        Preset(
            name="llama-3.1-8b",
            model="meta-llama/Llama-3.1-8B-Instruct",
            sae=("goodfire-llama-3.1-8b-instruct", "layer_19"),
            site="blocks.19.hook_resid_post",
            dtype="bfloat16",
            training=TrainingConfig(micro_batch_size=8),
            needs="access to the gated model, one 40 GB GPU in bf16, 20 GB disk",
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``. Raises ValueError listing the presets where there is none."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]
