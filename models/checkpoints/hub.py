"""Hub ids: download what a build needs, pinned to a commit. huggingface_hub is imported only when it is called."""

import re
from pathlib import Path

from ... import CheckpointError
from .base import TEXT_FILES

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# not `*.safetensors`: some repositories hold the weights a second time, as `consolidated.safetensors`
_NEEDED = ["config.json", *TEXT_FILES, "model*.safetensors", "model.safetensors.index.json"]


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form `organisation/name`."""
    return _ID.fullmatch(source) is not None and ".." not in source


def download(repo_id: str, *, revision: str | None = None, offline: bool = False) -> tuple[Path, str]:
    """Bring a repository's config, tokenizer and safetensors into the hub cache (resuming what was begun).

    Args:
        repo_id: `organisation/name`.
        revision: branch, tag or commit; the default branch if None.
        offline: use only what the cache has.

    Returns:
        The folder, and the commit that it is.

    Raises:
        CheckpointError: not found, gated, not in the cache, or the network failed.
    """
    import huggingface_hub
    from huggingface_hub import errors

    name = f"{repo_id}@{revision}" if revision else repo_id
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=_NEEDED, local_files_only=offline
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its terms on its page and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: there is no such folder here and no such repository on the hub; if it is private, `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        remedy = "build once without --offline" if offline else "check the network"
        raise CheckpointError(f"{name} is not in the local hub cache; {remedy}") from error
    except Exception as error:  # the library lets through what its HTTP client raises, and clients change
        raise CheckpointError(f"{name} could not be downloaded: {error}") from error
    return Path(folder), Path(folder).name
