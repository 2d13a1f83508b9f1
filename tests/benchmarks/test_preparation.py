import sys
from pathlib import Path

import pytest
from typer import BadParameter
from typer.testing import CliRunner

from benchmarks import BenchmarkError, UnavailableError, __main__
from benchmarks.peer import Peer, Sources, installed_versions
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


def test_a_peer_that_cannot_take_part_is_skipped_with_the_reason(tmp_path):
    def peer(name: str, distribution: str) -> Peer:
        return Peer(name, name.title(), (distribution,), "zonda", lambda _: tmp_path, lambda *_: None)

    here, gone = peer("here", "pytest"), peer("gone", "no-such-runtime")
    sources = Sources(tmp_path, None, tmp_path, tmp_path)
    chosen = {"here": here, "gone": gone, "zonda": PEERS["zonda"]}
    participants, versions, skipped = __main__._prepare(chosen, sources, __main__.Console(quiet=True))
    assert [one.name for one in participants] == ["here"]
    assert versions == {"here": {"pytest": pytest.__version__}}
    assert "no-such-runtime" in skipped["gone"]
    assert skipped["zonda"] == "no bundle was given"


def test_with_nobody_left_the_command_fails_and_says_why(tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    options = ["--work", str(tmp_path), "--peers-python", str(tmp_path / "none")]
    result = CliRunner().invoke(__main__.app, ["peers", str(model), *options])
    assert result.exit_code == 1
    assert "no bundle was given" in result.stderr
    assert "genai: no interpreter at" in result.stderr


def test_an_unknown_runtime_is_refused_with_the_known_ones():
    with pytest.raises(
        BadParameter, match="unknown runtime 'llamacpp'; known: zonda, llama_cpp, ctranslate2, genai, transformers"
    ):
        __main__._known("llamacpp")


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_named_as_their_file(name):
    file = Path(__main__.__file__).parent / "peers" / f"{name}.py"
    assert file.exists()
