"""Upload of an exported folder to the Hugging Face hub (``mfctl export --push``). Extra ``hub``."""

import os
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from preprocessing.io.errors import InfrastructureError


def open_hub(repo: str) -> Any:
    """Return a client of the hub at ``HF_ENDPOINT`` with a valid token; nothing is uploaded.

    Raises:
        UserInputError: huggingface_hub is not installed, the name of the repository is wrong, or the token is missing
            or not accepted.
        InfrastructureError: The hub does not answer.
    """
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise UserInputError(
            "--push: huggingface_hub is not installed. Run pip install 'mutual-forcing[hub]'"
        ) from None
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserInputError(f"--push {repo}: {error} Write USER/NAME") from None
    if get_token() is None:
        raise UserInputError("--push: no token of the hub. Set HF_TOKEN, or run `hf auth login`")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.whoami()
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserInputError(
                f"--push: {api.endpoint} does not accept the token. Set HF_TOKEN to a token with write access"
            ) from None
        raise _no_answer(api, error) from None
    except Exception as error:  # of the network
        raise _no_answer(api, error) from None
    return api


def _no_answer(api: Any, error: Exception) -> InfrastructureError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return InfrastructureError(
        f"--push: {api.endpoint} failed: {cause:.200}. Nothing was written. Check HF_ENDPOINT and the network, then "
        "run the same command again"
    )


def push_folder(api: Any, folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder as one commit, create the repository if needed, and return the URL.

    Raises InfrastructureError after a failure. The folder stays, and the message has the command that uploads it.
    """
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=f"Export {folder.name}")
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InfrastructureError(
            f"--push {repo}: the upload failed: {cause:.300}. {folder} is complete. Upload it with "
            f"`hf upload {repo} {folder} .`"
        ) from None
    return str(getattr(made, "repo_url", None) or f"{api.endpoint}/{repo}")
