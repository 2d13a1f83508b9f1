"""Hub ids: which files are asked for, what is pinned, and every failure in words. Nothing here uses the network."""

import json
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save, save_file

from zonda import CheckpointError
from zonda.models.checkpoints import fetch, open_checkpoint
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


class Hub:
    """A double of the hub: a repository's files, and what was asked of it."""

    def __init__(self, cache, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, []
        self.folder = cache / "models--org--other" / "snapshots" / COMMIT

    def model_info(self, repo_id, *, revision=None):
        self.asked.append((repo_id, revision))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns, local_files_only=False):
        assert not local_files_only
        self.asked.append((repo_id, revision))
        for name in huggingface_hub.utils.filter_repo_objects(self.files, allow_patterns=allow_patterns):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(self.files[name])
        self.folder.mkdir(parents=True, exist_ok=True)
        return str(self.folder)

    def held(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(cache, monkeypatch):
    """A function: the files of org/other -> the hub that has it."""

    def make(files: dict[str, bytes]) -> Hub:
        made = Hub(cache, files)
        monkeypatch.setattr(huggingface_hub, "model_info", made.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        return made

    return make


TEXTS = {
    "config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}",
    "generation_config.json": b"{}", "chat_template.jinja": b"",
}  # fmt: skip
OTHERS = {
    "README.md", "modeling.py", "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "m.gguf",
    "model.fp16.safetensors", "onnx/model.onnx", "original/model.safetensors",
}  # fmt: skip


def test_downloads_the_shards_that_the_index_names_and_no_other_form_of_the_weights(hub):
    shards = {f"model-0000{i}-of-00002.safetensors": save({f"w{i}": torch.ones(1)}) for i in (1, 2)}
    index = {"weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    wanted = {**TEXTS, "model.safetensors.index.json": json.dumps(index).encode(), **shards}
    made = hub(wanted | dict.fromkeys(OTHERS | {"model.safetensors"}, b""))
    checkpoint = open_checkpoint("org/other", revision="v1")
    assert checkpoint.tensors.keys() == {"w1", "w2"}
    assert made.held() == set(wanted)
    assert made.asked == [("org/other", "v1"), ("org/other", "v1"), ("org/other", COMMIT)]
    assert checkpoint.source.revision == COMMIT


def test_downloads_a_single_file(hub):
    wanted = {**TEXTS, "model.safetensors": save({"w": torch.ones(1)})}
    made = hub(wanted | dict.fromkeys(OTHERS, b""))
    assert open_checkpoint("org/other").load("w").tolist() == [1]
    assert made.held() == set(wanted)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["pytorch_model.bin"], r"holds its weights as a pickle \(pytorch_model\.bin\), .* runs the code in it"),
        (["a.Q4_0.gguf", "b.gguf"], r"holds GGUF files; download one of them and name it: a\.Q4_0\.gguf, b\.gguf"),
        (["adapter_model.safetensors"], r"has no model\.safetensors and no model\.safetensors\.index\.json"),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_its_weights_are_downloaded(hub, files, words):
    made = hub(TEXTS | dict.fromkeys(files, b""))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint("org/other")
    assert made.held() == set(TEXTS)


def test_an_index_cannot_ask_for_files_elsewhere(hub):
    index = json.dumps({"weight_map": {"w": "../../secret"}}).encode()
    hub({**TEXTS, "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_checkpoint("org/other")


def test_an_incomplete_snapshot_in_the_cache_names_the_file(cache):
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lists model-1\.safetensors, which is not there; download it again"):
        open_checkpoint("org/name", offline=True)


def test_fetching_gives_the_commit_and_leaves_paths_alone(hub, cache, tiny_folder):
    hub({**TEXTS, "model.safetensors": save({"w": torch.ones(1)})})
    assert fetch("org/other", revision="main") == COMMIT
    assert fetch(tiny_folder, revision=None) is None
    assert fetch("somewhere.gguf", revision="v1") == "v1"


def test_fetching_offline_finds_what_is_there(cache):
    assert fetch("org/name", offline=True) == COMMIT
    with pytest.raises(CheckpointError, match="build once without --offline"):
        fetch("org/other", offline=True)


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub/org/name"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("gated", response=response(403)), "org/name is gated: .*hf auth login"),
        (errors.RepositoryNotFoundError("none", response=response(404)), "no such folder here and no such repository"),
        (errors.RevisionNotFoundError("none", response=response(404)), "no such revision"),
        (errors.LocalEntryNotFoundError("offline"), "check the network"),
        (errors.HfHubHTTPError("down", response=response(503)), "could not be downloaded: down; check the network"),
        (httpx2.ConnectError("no route"), "could not be downloaded: no route; check the network, or use --offline"),
        (httpx2.ProxyError("proxy"), "could not be downloaded: proxy"),
        (OSError(28, "No space left on device"), "could not be downloaded: .*No space"),
    ],
)
@pytest.mark.parametrize("step", ["model_info", "snapshot_download"])
def test_every_failure_of_the_hub_is_an_error_in_words(hub, monkeypatch, error, words, step):
    def fail(repo_id, **options):
        raise error

    hub(TEXTS)
    monkeypatch.setattr(huggingface_hub, step, fail)
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
