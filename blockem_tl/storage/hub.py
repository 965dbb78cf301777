"""The Hugging Face hub: a folder up, files down, through huggingface_hub; and the parts of a model card."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

_ADVICE = "is there a network, is HF_HUB_OFFLINE unset, and are you logged in (`hf auth login`, or token=)?"


def push_folder(folder: Path, repo_id: str, *, private: bool, token: str | None, message: str) -> str:
    """Upload a folder's files in one commit, into a repository that is made if it is not there; returns its address.

    Raises:
        ValueError: a name that is no repository's.
        ConnectionError: the hub cannot be reached, or refuses.
    """
    _check_name(repo_id)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).repo_url)
    except Exception as error:  # httpx, the hub's own and offline errors have no common class
        raise _unreachable(repo_id, "push to", error) from error


def pull_file(repo_id: str, name: str, *, revision: str | None, token: str | None) -> Path:
    """A file's place in the hub's cache, downloaded if need be. Raises as `push_folder`."""
    _check_name(repo_id)
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, token=token))
    except Exception as error:
        raise _unreachable(f"{repo_id}/{name}", "get", error) from error


def pull_folder(repo_id: str, names: Sequence[str], *, revision: str | None, token: str | None) -> Path:
    """A folder in the hub's cache that holds these files of a repository. Raises as `push_folder`."""
    _check_name(repo_id)
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(names), revision=revision, token=token))
    except Exception as error:
        raise _unreachable(repo_id, "get", error) from error


def card(metadata: dict[str, Any], title: str, paragraphs: Sequence[str]) -> str:
    """A README for the hub: metadata in YAML, then the text."""
    head = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n# {title}\n\n" + "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def hub_name(model: str) -> str | None:
    """The model's name if it can be one on the hub; a folder of this machine is nobody else's business."""
    return model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists() else None


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"hub: expected a repository as user/name, got {repo_id!r}: {error}") from error


def _unreachable(what: str, verb: str, error: Exception) -> ConnectionError:
    offline = isinstance(error, OfflineModeIsEnabled)
    return ConnectionError(f"hub: cannot {verb} {what}: {'HF_HUB_OFFLINE is set' if offline else str(error)[:300]}; {_ADVICE}")
