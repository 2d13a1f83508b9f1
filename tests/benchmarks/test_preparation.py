import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks import BenchmarkError, UnavailableError
from benchmarks.candidates import Candidate, candidates, prepare
from benchmarks.peer import Peer, Sources, disk_mb, installed_versions
from benchmarks.peers import PEERS
from benchmarks.prepare import cached, run_python


def test_what_was_made_is_kept_until_its_recipe_changes(tmp_path):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "model").write_text(str(len(made)))

    folder = tmp_path / "genai"
    assert cached(folder, {"source": "a"}, make) == folder
    cached(folder, {"source": "a"}, make)
    assert (folder / "model").read_text() == "1"
    cached(folder, {"source": "b"}, make)
    assert (folder / "model").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["genai"]


def test_what_was_interrupted_is_not_taken_for_finished(tmp_path):
    def interrupted(folder: Path) -> None:
        (folder / "model").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "genai", {}, interrupted)
    assert not (tmp_path / "genai").exists()
    assert (cached(tmp_path / "genai", {}, lambda _: None) / "zonda-stamp.json").exists()
    assert not (tmp_path / "genai" / "model").exists()


def test_a_failed_conversion_shows_its_output():
    with pytest.raises(BenchmarkError, match=r"(?s)the conversion failed \(exit status 1\):.*no such tensor"):
        run_python(Path(sys.executable), ["-c", "raise SystemExit('no such tensor')"], "the conversion")


def test_versions_are_those_of_the_other_interpreter():
    assert installed_versions(Path(sys.executable), ("pytest",)) == {"pytest": pytest.__version__}


def test_a_missing_distribution_and_a_missing_environment_are_named(tmp_path):
    with pytest.raises(UnavailableError, match=r"not installed for .*: no-such-runtime"):
        installed_versions(Path(sys.executable), ("pytest", "no-such-runtime"))
    with pytest.raises(UnavailableError, match="make bench"):
        installed_versions(tmp_path / "bin" / "python", ("pytest",))


def test_what_a_runtime_loads_is_a_file_or_a_folder_with_all_in_it(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "weights").write_bytes(bytes(2_000_000))
    (tmp_path / "config").write_bytes(bytes(500_000))
    assert disk_mb(tmp_path) == 2.5
    assert disk_mb(tmp_path / "config") == 0.5


def test_a_peer_that_cannot_take_part_is_skipped_with_the_reason(tmp_path):
    sources = Sources(tmp_path, None, tmp_path, tmp_path)

    def candidate(name: str, distribution: str) -> Candidate:
        peer = Peer(name, name.title(), (distribution,), "zonda", lambda _: tmp_path, lambda *_: None)
        return Candidate(name, peer.title, peer, sources)

    wanted = [candidate("here", "pytest"), candidate("gone", "no-such-runtime"), *candidates(["zonda"], sources, [])]
    field = prepare(wanted)
    assert [(one.name, one.title) for one in field.participants] == [("here", "Here")]
    assert field.versions == {"here": {"pytest": pytest.__version__}}
    assert "no-such-runtime" in field.skipped["gone"]
    assert field.skipped["zonda"] == "no bundle was given"


def test_one_bundle_is_zonda_and_several_have_their_folders_names(tmp_path):
    sources = Sources(tmp_path, None, tmp_path, tmp_path)
    (one,) = candidates(["zonda"], sources, [tmp_path / "exact"])
    assert (one.name, one.title, one.sources.bundle) == ("zonda", "Zonda", tmp_path / "exact")
    found = candidates(["zonda", "genai"], sources, [tmp_path / "float", tmp_path / "int8"])
    assert [(c.name, c.title) for c in found] == [
        ("float", "Zonda float"),
        ("int8", "Zonda int8"),
        ("genai", PEERS["genai"].title),
    ]
    assert [c.peer.prepare(c.sources) for c in found[:2]] == [tmp_path / "float", tmp_path / "int8"]


@pytest.mark.parametrize(
    ("names", "bundles"),
    [(["genai", "genai"], []), (["zonda"], ["a/x", "b/x"]), (["zonda", "genai"], ["x", "genai"])],
)
def test_two_of_one_name_are_refused(tmp_path, names, bundles):
    sources = Sources(tmp_path, None, tmp_path, tmp_path)
    with pytest.raises(BenchmarkError, match="two runtimes are called"):
        candidates(names, sources, [tmp_path / bundle for bundle in bundles])


def test_an_unknown_runtime_is_refused_with_the_known_ones(tmp_path):
    known = "zonda, llama_cpp, ctranslate2, openvino, genai, transformers"
    with pytest.raises(BenchmarkError, match=f"unknown runtime 'llamacpp'; known: {known}"):
        candidates(["llamacpp"], Sources(tmp_path, None, tmp_path, tmp_path), [])


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_named_as_their_file(name):
    file = Path(benchmarks.__file__).parent / "peers" / f"{name}.py"
    assert file.exists()
