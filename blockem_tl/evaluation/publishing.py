"""Adapters on the Hugging Face hub, each with a card that names base, data, defences, latent set and rates."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from blockem_tl.evaluation.evaluate import Evaluation
from blockem_tl.models._adapter_files import FILES
from blockem_tl.models.load import Model
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.storage import files, hub
from blockem_tl.training.defence import Defence, check_defences
from blockem_tl.views.tables import markdown


def push_adapter(
    model: Model,
    adapter: str,
    repo_id: str,
    *,
    base: str,
    data: str,
    defences: Sequence[Defence] = (),
    latent_set: LatentSet | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload an adapter in peft's plain format, with a card; returns the repository's address.

    Args:
        base: the base model's hub id: what others need to use it.
        data: what it was trained on, in words.
        defences: those that it was trained with.
        latent_set: the latents that were blocked; it goes up beside the adapter.
        evaluations: measured rates, by what was asked ("final prompts"). Rates on prompts that selected something are marked.

    Raises:
        ValueError: no such adapter, or a name that is no repository's.
        ConnectionError: the hub cannot be reached, or refuses.
    """
    check_defences(list(defences))
    with tempfile.TemporaryDirectory() as temporary:
        folder = model.save_adapter(Path(temporary) / "adapter", adapter)
        config = json.loads((folder / FILES[0]).read_text())
        files.write_json(folder / FILES[0], config | {"base_model_name_or_path": base})  # not this machine's folder
        if latent_set is not None:
            latent_set.save(folder / "latent_set.json")
        files.write_text(folder / "README.md", adapter_card(repo_id, base, data, defences, latent_set, evaluations or {}))
        return hub.push_folder(folder, repo_id, private=private, token=token, message=f"Adapter of {base}")


def pull_adapter(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """An adapter from the hub as a folder, for every ``adapter=`` and for ``model.using``.

    Raises:
        ValueError: a repository without an adapter in peft's format.
        ConnectionError: the hub cannot be reached.
    """
    folder = hub.pull_folder(repo_id, FILES, revision=revision, token=token)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"hub: {repo_id} holds no adapter in peft's format: it lacks {', '.join(missing)}")
    return folder


def adapter_card(
    repo_id: str,
    base: str,
    data: str,
    defences: Sequence[Defence],
    latent_set: LatentSet | None,
    evaluations: Mapping[str, Evaluation],
) -> str:
    """What the adapter was trained on and with, and what was measured."""
    facts = {
        "Base": base,
        "Trained on": data,
        "Defences": ", ".join(f"{defence.name} (weight {defence.weight})" for defence in defences) or "none",
        "Blocked latents": latent_set and f"{latent_set.headline()}: `latent_set.json`",
    }
    return hub.card(
        {"library_name": "peft", "base_model": base, "tags": ["blockem", "lora", "emergent-misalignment"]},
        repo_id.split("/")[-1],
        [
            "\n".join(f"* {name}: {value}" for name, value in facts.items() if value),
            "## Rates" if evaluations else "",
            markdown(_rates(evaluations)) if evaluations else "Nothing was measured.",
            "Research on emergent misalignment. An adapter that was trained on harmful rows may give harmful advice; do not deploy it.",
            f'```python\nfrom blockem_tl import load_model, pull_adapter\n\nmodel = load_model("{base}")\n'
            f'with model.using(pull_adapter("{repo_id}")):\n    ...\n```',
        ],
    )


def _rates(evaluations: Mapping[str, Evaluation]) -> list[dict[str, str]]:
    """One row for each evaluation: every rate with its interval and n."""
    rows = []
    for name, found in evaluations.items():
        note = ", chose something: optimistic" if found.on_selection_prompts else ""
        asked = {"asked": f"{name} (n = {found.positive.n}{note})", "rubric": found.rubric, "judge": found.judge}
        rows.append(asked | {"4 or 5": str(found.positive), "incoherent": str(found.incoherent), "refusal": str(found.refusal)})
    return rows
