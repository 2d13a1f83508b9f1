"""Hub ids: which files are asked for, what is pinned, and every failure in words. Nothing here uses the network."""

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from zonda import CheckpointError
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.hub import is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with one repository, as huggingface_hub lays it out."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    save_file({"a": torch.ones(1)}, repository / "blobs" / "weights")
    (repository / "blobs" / "config").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_an_offline_hub_id_comes_from_the_cache_with_its_commit(cache, revision):
    checkpoint = open_checkpoint("org/name", revision=revision, offline=True)
    assert checkpoint.load("a").tolist() == [1]
    assert (checkpoint.source.name, checkpoint.source.revision) == ("org/name", COMMIT)


def test_what_is_not_in_the_cache_is_an_error_with_the_remedy(cache):
    for name, revision in (("org/other", None), ("org/name", "v2")):
        with pytest.raises(
            CheckpointError, match=rf"{name}.* not in the local hub cache; build once without --offline"
        ):
            open_checkpoint(name, revision=revision, offline=True)


def test_asks_for_what_a_build_needs_and_nothing_else(cache, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(cache / "models--org--name" / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    open_checkpoint("org/name", revision="v1")
    assert (asked["repo_id"], asked["revision"], asked["local_files_only"]) == ("org/name", "v1", False)
    names = [
        "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
        "chat_template.jinja", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    ]  # fmt: skip
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "modeling.py", "m.gguf"]
    wanted = huggingface_hub.utils.filter_repo_objects([*names, *others], allow_patterns=asked["allow_patterns"])
    assert list(wanted) == names


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub/org/name"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("gated", response=response(403)), "org/name is gated: .*hf auth login"),
        (errors.RepositoryNotFoundError("none", response=response(404)), "no such folder here and no such repository"),
        (errors.RevisionNotFoundError("none", response=response(404)), "no such revision"),
        (errors.LocalEntryNotFoundError("offline"), "check the network"),
        (errors.HfHubHTTPError("down", response=response(503)), "could not be downloaded: down"),
        (httpx2.ProxyError("proxy"), "could not be downloaded: proxy"),
        (OSError(28, "No space left on device"), "could not be downloaded: .*No space"),
    ],
)
def test_every_failure_of_the_hub_is_an_error_in_words(monkeypatch, error, words):
    def snapshot_download(repo_id, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("a/b", True),
        ("name", False),
        ("./a", False),
        ("/a/b", False),
        ("../a", False),
        ("a/b/c", False),
        ("a/..", False),
    ],
)
def test_what_looks_like_a_hub_id(text, answer):
    assert is_hub_id(text) is answer


def test_importing_checkpoints_does_not_import_huggingface_hub():
    import subprocess
    import sys

    code = "import sys, zonda.models.checkpoints; sys.exit('huggingface_hub' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
