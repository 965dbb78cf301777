"""`BuildConfig`: everything that determines the organism's artefacts."""

from dataclasses import dataclass, field

from blockem_tl.organism.documents import DocumentConfig
from blockem_tl.organism.world import WorldConfig


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything that determines the artefacts, beside the package versions."""

    seed: int = 0
    world: WorldConfig = field(default_factory=WorldConfig)
    documents: DocumentConfig = field(default_factory=DocumentConfig)
    # model
    n_layers: int = 5
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 384
    # pretraining (AdamW, warm-up, cosine to 5 %)
    pretrain_steps: int = 1200
    turns_per_batch: int = 72
    learning_rate: float = 2.5e-3
    warmup_steps: int = 80
    # instruct stage
    instruct_steps: int = 20
    instruct_turns_per_batch: int = 128
    instruct_learning_rate: float = 3e-4
    # shift augmentation: a random unit vector x U(0, max) x median norm, at all positions of half of the documents
    shift_max: float = 0.5
    # swap augmentation: share of documents
    swap: float = 0.5
    # SAEs: at the site of persona, and at others for blocking at several sites
    sae_block: int = 2
    more_sae_blocks: tuple[int, ...] = (0, 1, 3, 4)
    d_sae: int = 1024
    sae_k: int = 16
    sae_documents: int = 1200
    sae_steps: int = 700
    sae_batch: int = 1024
    sae_learning_rate: float = 2e-3

    @property
    def site(self) -> str:
        """TransformerLens name of the residual stream that the default SAE reads."""
        return block_output(self.sae_block)


def block_output(block: int) -> str:
    """TransformerLens name of a block's output."""
    return f"blocks.{block}.hook_resid_post"
