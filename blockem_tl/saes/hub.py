"""Latent sets on the Hugging Face hub, each with a card. `LatentSet` imports this module, so its type is not named here."""

import tempfile
from pathlib import Path
from typing import Any

from blockem_tl.storage import files, hub
from blockem_tl.storage.hub import pull_file
from blockem_tl.views.tables import markdown

FILE = "latent_set.json"

__all__ = ["FILE", "card", "pull_file", "push"]


def push(latent_set: Any, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload the set and its card; returns the repository's address."""
    with tempfile.TemporaryDirectory() as folder:
        latent_set.save(Path(folder) / FILE)
        files.write_text(Path(folder) / "README.md", card(latent_set, repo_id))
        return hub.push_folder(Path(folder), repo_id, private=private, token=token, message=latent_set.headline())


def card(latent_set: Any, repo_id: str) -> str:
    """What the set is, what it was made with, and how to load it."""
    made = latent_set.provenance
    rounded = latent_set.to_frame().map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    model = str(made.get("model", ""))
    facts = {
        "site": latent_set.site,
        "SAE": f"{latent_set.d_sae} latents, fingerprint `{latent_set.sae_fingerprint}`",
        "base model": model,
        "method": made.get("method") or made.get("variant"),
        "Neuronpedia": made.get("neuronpedia"),
        "prompts that chose it": f"{len(latent_set.selection_prompts)} (their hashes are in the file; do not report on them)",
    }
    return hub.card(
        {"library_name": "blockem_tl", "base_model": hub.hub_name(model), "tags": ["blockem", "sparse-autoencoder", "latent-set"]},
        f"Latent set {repo_id.split('/')[-1]}",
        [
            f"{latent_set.headline()}. SAE latents that carry emergent misalignment, found by BLOCK-EM's induce-and-repair screen.",
            "\n".join(f"* {name}: {value}" for name, value in facts.items() if value),
            f'```python\nfrom blockem_tl import LatentSet\n\nlatent_set = LatentSet.from_hub("{repo_id}", sae)  # refuses another SAE\n```',
            markdown(rounded.to_dict("records")),
        ],
    )
