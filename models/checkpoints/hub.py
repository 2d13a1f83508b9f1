"""Hub ids: download what a build needs, pinned to a commit. huggingface_hub is imported only when it is called.

It resumes what was begun, shows progress, and takes its token from the place where `hf auth login` puts it.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from ... import CheckpointError
from .base import TEXT_FILES
from .folder import INDEX, PICKLES, SINGLE, shard_names

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form `organisation/name`."""
    return _ID.fullmatch(source) is not None and ".." not in source


def download(repo_id: str, *, revision: str | None = None) -> tuple[Path, str]:
    """Bring a repository's config, tokenizer and safetensors into the hub cache.

    Of the weights, those that the index names, else `model.safetensors`: repositories hold them in other forms too
    (`original/`, `consolidated.safetensors`, pickles, GGUF), which stay there.

    Args:
        repo_id: `organisation/name`.
        revision: branch, tag or commit; the default branch if None.

    Returns:
        The folder, and the commit that it is.

    Raises:
        CheckpointError: not found, gated, without safetensors, or the network failed.
    """
    import huggingface_hub

    with _explained(repo_id, revision, "check the network, or use --offline if it was downloaded before"):
        files = [file.rfilename for file in huggingface_hub.model_info(repo_id, revision=revision).siblings or ()]
        texts = ["config.json", *TEXT_FILES, INDEX]
        folder = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=texts))
        weights = shard_names(folder) if (folder / INDEX).is_file() else _single(repo_id, files)
        patterns = [glob.escape(name) for name in weights]
        huggingface_hub.snapshot_download(repo_id, revision=folder.name, allow_patterns=patterns)
    return folder, folder.name


def find_cached(repo_id: str, *, revision: str | None = None) -> tuple[Path, str]:
    """The same from the local cache alone.

    Args:
        repo_id, revision: as of `download`.

    Raises:
        CheckpointError: it is not there. Whether all of its files are, shows when the folder is opened.
    """
    import huggingface_hub

    with _explained(repo_id, revision, "build once without --offline"):
        found = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=["config.json"], local_files_only=True
        )
    return Path(found), Path(found).name


def _single(repo_id: str, files: Sequence[str]) -> list[str]:
    """The one weight file of a repository without an index."""
    if SINGLE in files:
        return [SINGLE]
    ggufs = [name for name in files if name.endswith(".gguf")]
    pickles = [name for name in files if any(fnmatch(name, pattern) for pattern in PICKLES)]
    if ggufs:
        raise CheckpointError(f"{repo_id} holds GGUF files; download one of them and name it: {', '.join(ggufs[:8])}")
    if pickles:
        raise CheckpointError(
            f"{repo_id} holds its weights as a pickle ({pickles[0]}), and loading a pickle runs the code in it; "
            "choose a revision with safetensors"
        )
    raise CheckpointError(f"{repo_id} has no {SINGLE} and no {INDEX}")


@contextmanager
def _explained(repo_id: str, revision: str | None, remedy: str) -> Iterator[None]:
    """Turn every failure of the hub into a `CheckpointError`; `remedy` is for what is neither here nor reachable."""
    from huggingface_hub import errors

    name = f"{repo_id}@{revision}" if revision else repo_id
    try:
        yield
    except CheckpointError:
        raise
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
        raise CheckpointError(f"{name} is not in the local hub cache; {remedy}") from error
    except Exception as error:  # the library lets through what its HTTP client raises, and clients change
        raise CheckpointError(f"{name} could not be downloaded: {error}; {remedy}") from error
