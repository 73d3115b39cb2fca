"""Errors of the Hub's client as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from cl_prompts.runtime.text import short_repr


class HubError(OSError):
    """The Hub cannot be reached, refuses, or lacks the repository or file; the message says what to do."""


@contextmanager
def explain_hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub's client into a `HubError` of one line.

    A file that the repository does not have stays an `EntryNotFoundError`; the caller handles it.

    Raises:
        HubError: for every error of the client and of its connection.
        ValueError: `repo_id` is not a valid repository name.
    """
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{short_repr(repo_id)} is neither a folder nor a Hub id like 'name/pool'") from error
    except LocalEntryNotFoundError as error:
        raise HubError(_unreachable(f"{repo_id} is not in the cache")) from error
    except (RemoteEntryNotFoundError, EntryNotFoundError):
        raise
    except HfHubHTTPError as error:
        raise HubError(_refused(error, repo_id, revision)) from error
    except LocalTokenNotFoundError as error:
        raise HubError("no token: run `hf auth login`, or pass token=") from error
    except (OfflineModeIsEnabled, httpx.HTTPError, ConnectionError, TimeoutError) as error:
        raise HubError(_unreachable("nothing was changed")) from error
    except RuntimeError as error:  # of an upload of large files; the reason is its cause
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(_refused(error.__cause__, repo_id, revision)) from error
        if isinstance(error.__cause__, (httpx.HTTPError, OSError)):
            raise HubError(_unreachable("nothing was changed")) from error
        raise


def _unreachable(consequence: str) -> str:
    if constants.is_offline_mode():
        return f"HF_HUB_OFFLINE is set and {consequence}: unset it, or name a local folder"
    return f"cannot reach {constants.ENDPOINT}, {consequence}: check the network, then try again"


def _refused(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, then run `hf auth login`"
    if isinstance(error, DisabledRepoError):
        return f"{repo_id} was disabled by the Hub: write to its author"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: see {constants.ENDPOINT}/{repo_id}/tree/main"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {repo_id} for you: check the name; if it is private, run `hf auth login` or pass token="
    if status == 401:
        return "the Hub does not know this token: run `hf auth login`, or pass token="
    if status == 403:
        return f"the token may not do that with {repo_id}: use one with write permission, or a name that is yours"
    if status == 409:
        return f"{repo_id} was changed or created by somebody else at the same time: look at it, then try again"
    if status == 429 or status >= 500:
        return f"the Hub is busy or down (status {status}), nothing was changed: try again later"
    return f"the Hub refused {repo_id} (status {status}): {short_repr(error.server_message or 'no reason given')}"
