"""What a folder must hold, how shards fit their index, and which files travel along."""

import json
import os

import pytest
import torch
from safetensors.torch import save, save_file

from zonda import CheckpointError
from zonda.models.checkpoints import open_checkpoint

INDEX = "model.safetensors.index.json"
TWICE = {"one.safetensors": ["a"], "two.safetensors": ["a", "b"]}


def shards(place, weight_map=None, files=None):
    """Write shards and an index; by default a in the first, b in the second."""
    files = {"one.safetensors": ["a"], "two.safetensors": ["b"]} if files is None else files
    for name, tensors in files.items():
        save_file({tensor: torch.full((2,), ord(tensor)).float() for tensor in tensors}, place / name)
    weight_map = {t: name for name, tensors in files.items() for t in tensors} if weight_map is None else weight_map
    (place / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return place


def test_a_single_file(tiny_folder):
    checkpoint = open_checkpoint(tiny_folder)
    assert checkpoint.kind == "normal"
    assert (checkpoint.source.name, checkpoint.source.format) == ("tiny", "safetensors F32")
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert "lm_head.weight" in checkpoint.tensors


def test_shards(folder):
    checkpoint = open_checkpoint(shards(folder(None)))
    assert checkpoint.load("a").tolist() == [97, 97]
    assert checkpoint.load("b").tolist() == [98, 98]
    assert set(checkpoint.sha256()) == {"one.safetensors", "two.safetensors"}


@pytest.mark.parametrize(
    "shard",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "", "sub/one.safetensors", "..\\one.safetensors", "one\0"],
)
def test_an_index_cannot_name_a_file_elsewhere(folder, shard):
    place = shards(folder(None), {"a": shard, "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_checkpoint(place)


@pytest.mark.parametrize(
    ("weight_map", "files", "words"),
    [
        ({"a": "three.safetensors"}, None, r"lists three\.safetensors, which is not there"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, None, r"a should be in two\.safetensors, it is in one"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, None, "c should be in .* no file"),
        ({"a": "one.safetensors"}, {"one.safetensors": ["a", "b"]}, "b should be in None"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, TWICE, r"tensor a is in one\.safetensors and in two"),
        ([], None, "weight_map must map"),
        ({"a": 1}, None, "weight_map must map"),
    ],
)
def test_index_and_shards_must_say_the_same(folder, weight_map, files, words):
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(shards(folder(None), weight_map, files))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_cannot_lead_out_of_the_folder(folder, tmp_path, name):
    place = folder(save({"a": torch.ones(1)}), tokenizer__json=b"{}")
    outside = tmp_path / "outside"
    (place / name).rename(outside)
    os.symlink(outside, place / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link to {outside}"):
        open_checkpoint(place)


def test_a_link_to_the_folder_itself_is_fine(folder, tmp_path):
    os.symlink(folder(save({"a": torch.ones(1)})), tmp_path / "link")
    assert open_checkpoint(tmp_path / "link").load("a").tolist() == [1]


def test_links_of_the_hub_cache_lead_to_its_blobs(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name, data in (("config.json", b"{}"), ("model.safetensors", save({"a": torch.ones(1)}))):
        (repository / "blobs" / f"blob-{name}").write_bytes(data)
        os.symlink(f"../../blobs/blob-{name}", snapshot / name)
    assert open_checkpoint(snapshot).load("a").tolist() == [1]


def test_a_path_that_is_not_there():
    with pytest.raises(CheckpointError, match=r"/nowhere/at/all: there is no such file or folder"):
        open_checkpoint("/nowhere/at/all")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint("out/missing.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_reason_and_remedy(folder, tmp_path, name):
    place = folder(None)
    (place / name).write_bytes(b"\x80\x04.")
    for source in (place, place / name):
        with pytest.raises(CheckpointError, match=r"runs the code in it; .*(safetensors|convert)"):
            open_checkpoint(source)


def test_a_folder_without_weights_or_without_a_config(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        open_checkpoint(folder(None))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_no_json_object(folder, config):
    place = folder(save({"a": torch.ones(1)}), config__json=config)
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|must hold a JSON object)"):
        open_checkpoint(place)


def test_a_text_file_of_a_gigabyte_is_not_read(folder):
    place = folder(save({"a": torch.ones(1)}), tokenizer__json=b"{}")
    with (place / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is too large"):
        open_checkpoint(place)


def test_a_file_that_may_not_be_read_is_an_error_in_words(folder, monkeypatch):
    from pathlib import Path

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    place = folder(save({"a": torch.ones(1)}))
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Permission denied"):
        open_checkpoint(place)


def test_text_files_travel_and_others_do_not(folder):
    place = folder(save({"a": torch.ones(1)}), tokenizer__json=b"{}", generation_config__json=b"{}", README__md=b"x")
    assert open_checkpoint(place).files == {"tokenizer.json": b"{}", "generation_config.json": b"{}"}


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("inside", "beside", "expected"),
    [
        ("A", None, b"A"),
        (NAMED, None, b"D"),
        (NAMED[:1], None, None),
        ([{"name": ["default"]}, 7], None, None),
        ("A", b"B", b"B"),
        (None, None, None),
    ],
)
def test_the_chat_template_becomes_a_file_of_its_own(folder, inside, beside, expected):
    texts = {} if beside is None else {"chat_template__jinja": beside}
    config = json.dumps({"eos_token": "é", "chat_template": inside}).encode()
    files = open_checkpoint(folder(save({"a": torch.ones(1)}), tokenizer_config__json=config, **texts)).files
    assert files.get("chat_template.jinja") == expected
    assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "é"}
