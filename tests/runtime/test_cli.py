"""The command `zonda`, as a user calls it."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from zonda.runtime import Pipeline, SamplingParams

ZONDA = [sys.executable, "-c", "from zonda.runtime.cli import main; main()"]


def zonda(*arguments, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([*ZONDA, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def expected(tiny_bundle):
    with Pipeline.load(tiny_bundle) as pipeline:
        return pipeline.generate("the wind", SamplingParams(temperature=0, max_tokens=8)).text


def test_generate_prints_the_continuation(tiny_bundle, expected):
    result = zonda("generate", tiny_bundle, "the wind", "--temperature", 0, "--max-tokens", 8)
    assert (result.returncode, result.stdout) == (0, expected + "\n")


def test_generate_reads_the_prompt_from_standard_input(tiny_bundle, expected):
    for arguments in ((), ("-",)):
        result = zonda("generate", tiny_bundle, *arguments, "--temperature", 0, "--max-tokens", 8, stdin="the wind")
        assert result.stdout == expected + "\n"


def test_timings_go_to_standard_error(tiny_bundle, expected):
    result = zonda("generate", tiny_bundle, "the wind", "--temperature", 0, "--max-tokens", 8, "--timings")
    assert result.stdout == expected + "\n"
    assert "decode 8 tokens" in result.stderr


def test_chat_answers_each_line(tiny_bundle):
    with Pipeline.load(tiny_bundle) as pipeline:
        session = pipeline.session()
        params = SamplingParams(temperature=0, max_tokens=5)
        answers = [session.chat(line, params).text for line in ("hot", "dry")]
    result = zonda("chat", tiny_bundle, "--temperature", 0, "--max-tokens", 5, stdin="hot\ndry\n")
    assert (result.returncode, result.stdout) == (0, "".join(f"{a}\n" for a in answers))


def test_inspect_shows_a_page_and_json(tiny_bundle):
    page = zonda("inspect", tiny_bundle).stdout
    for words in (
        "LlamaForCausalLM",
        "safetensors F32",
        "128 tokens a row",
        "512 bytes a token",
        "onnxruntime",
        "runs",
    ):
        assert words in page
    manifest = json.loads(zonda("inspect", tiny_bundle, "--json").stdout)
    assert manifest["limits"]["capacity"] == 128


def test_version(tiny_bundle):
    assert zonda("--version").stdout.strip() == metadata.version("zonda")


def test_build_is_a_command_that_is_loaded_when_called(tiny_folder, tmp_path):
    assert "build" in zonda("--help").stdout
    result = zonda("build", tiny_folder, "-o", tmp_path / "out", "--verify", "off")
    assert (result.returncode, result.stdout.strip()) == (0, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "nowhere", "hi"], "is not an engine bundle"),
        (["generate", "BUNDLE", ""], "the prompt is empty"),
        (["generate", "BUNDLE", "hi", "--temperature", "-1"], "temperature must be"),
        (["generate", "BUNDLE", "hi", "--temperature", "0", "--top-k", "5"], "temperature 0 is greedy"),
        (["generate", "BUNDLE", "wind " * 300], "the capacity of the engine is 128"),
        (["generate", "BUNDLE", "hi", "--target", "tensorrt"], "was not built for it"),
        (["inspect", "nowhere"], "is not an engine bundle"),
    ],
)
def test_errors_are_one_line_and_status_1(tiny_bundle, arguments, words):
    result = zonda(*(str(tiny_bundle) if a == "BUNDLE" else a for a in arguments))
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_option_or_command_is_refused(tiny_bundle):
    assert zonda("generate", tiny_bundle, "hi", "--warmth", "1").returncode == 2
    assert zonda("dance").returncode == 2


def test_a_reader_that_goes_away_is_no_traceback(tiny_bundle):
    command = " ".join(map(repr, [*ZONDA, "generate", str(tiny_bundle), "the wind", "--max-tokens", "60"]))
    result = subprocess.run(["bash", "-c", f"{command} | true"], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr


def test_speculation_changes_no_text_and_says_what_was_accepted(tiny_bundle):
    arguments = (
        "generate",
        tiny_bundle,
        "the wind the wind the wind",
        "--temperature",
        0,
        "--max-tokens",
        60,
        "--timings",
    )
    plain, drafting = zonda(*arguments), zonda(*arguments, "--speculate", "ngram")
    assert plain.stdout == drafting.stdout
    assert "drafted" not in plain.stderr
    refused = zonda(*arguments, "--speculate", "draft")
    assert (refused.returncode, "speculate must be 'ngram'" in refused.stderr) == (1, True)


def test_threads_can_come_from_the_environment(tiny_bundle, monkeypatch):
    monkeypatch.setenv("ZONDA_THREADS", "0")
    assert "threads must be at least 1, found 0" in zonda("generate", tiny_bundle, "hi").stderr


def test_generating_loads_nothing_that_prints_tables(tiny_bundle):
    script = (
        "import sys; from zonda.runtime.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "print([m for m in ('rich.console', 'rich.table') if m in sys.modules])"
    )
    arguments = [sys.executable, "-c", script, "generate", str(tiny_bundle), "hi", "--max-tokens", "1"]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.endswith("[]\n")
