"""The command line: `python -m benchmarks peers MODEL.gguf BUNDLE`, and `host-time` and `speculate` for one bundle.

What is measured against peers, and how, for every runtime alike (`worker.py` reads all clocks):

- prefill tok/s: prompt tokens / time from the moment the request's state is allocated to the first token, in a batch
  to the moment when every row has its first;
- first token ms: from the request to that moment, the allocation of the state included;
- decode tok/s: tokens of all rows after that moment / time from there to the last token;
- load s: importing the runtime and loading model and tokenizer, in an interpreter that already runs;
- cold start s: from the start of the process to its first token on the pipe, the files in the page cache;
- peak RSS: of the runtime's process, after all cases of a batch size and of smaller ones;
- perplexity, and KL divergence from the float32 model that transformers runs, on windows of Python's manual.

Decoding is greedy, always the same number of tokens, through end tokens.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import BenchmarkError, host_time, speculate
from .candidates import candidates, prepare
from .interleaved import measure
from .machine import Machine
from .peer import Sources
from .peers import PEERS
from .plan import Plan, cases
from .plot import draw
from .prompts import manual_ids, model_tokenizer, text_ids
from .quality import WINDOW
from .report import Report
from .tables import show

REFERENCE = "transformers"
"""Whose logits the others' are compared with: the float32 model, by the implementation that others are held to."""

PROMPTS, BATCHES = [32, 512, 1500], [1, 4, 8]

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Zonda against its peers, and against itself."""


@app.command()
def peers(
    model: Annotated[Path, typer.Argument(help="The GGUF file all runtimes get their weights from.", exists=True)],
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Zonda's bundles, compiled from it; each takes part.", exists=True)
    ] = None,
    prompt: Annotated[list[int], typer.Option(min=1, help="A prompt length in tokens; repeat for more.")] = PROMPTS,
    batch: Annotated[list[int], typer.Option(min=1, help="Rows at once; repeat for more.")] = BATCHES,
    longest_batch_prompt: Annotated[int, typer.Option(min=0, help="No batches above 1 at longer prompts.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate a row.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Rounds, each with one run of every runtime in every case.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of every runtime.")] = 2,
    loads: Annotated[int, typer.Option(min=1, help="How often to start each runtime.")] = 3,
    quality_tokens: Annotated[
        int, typer.Option(min=0, help=f"Tokens for perplexity and KL, whole windows of {WINDOW}; 0: none.")
    ] = 8 * WINDOW,
    peer: Annotated[list[str], typer.Option(help="A runtime; the first is compared with the others.")] = [*PEERS],  # noqa: B006
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw decode and prefill here.")] = None,
    work: Annotated[Path, typer.Option(help="Where the peers' inputs are made and kept.")] = Path("out/bench"),
    peers_python: Annotated[Path, typer.Option(help="The interpreter of the peers' environment.")] = Path(
        ".venv-bench/bin/python"
    ),
) -> None:
    """Compare runtimes on the same weights and prompts, in one interleaved run."""
    console = _console()
    if quality_tokens % WINDOW:
        raise typer.BadParameter(f"{quality_tokens} tokens are not whole windows of {WINDOW}")
    if not (chosen_cases := cases(prompt, batch, longest_batch_prompt)):
        raise typer.BadParameter("no prompt is as short as --longest-batch-prompt, and batch 1 was not asked for")
    # absolute, not resolved: a virtual environment's interpreter is a link, and is known by the link's place
    sources = Sources(model.absolute(), None, work.absolute(), peers_python.absolute())
    with _failing_with_a_message():
        wanted = candidates(peer, sources, [bundle.absolute() for bundle in bundles or ()])
        with console.status("start") as status:
            field = prepare(wanted, status.update)
            tokenizer = model_tokenizer([one.model for one in field.participants])
            manual = manual_ids(tokenizer, quality_tokens)
            plan = Plan(chosen_cases, new_tokens, pairs, threads, loads, text_ids(tokenizer), manual)
            for file in (json_file, plot):
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
            measurement = measure(field.participants, plan, sources.work, status.update, REFERENCE)
        report = Report(
            subject=field.participants[0].name,
            model={"name": model.name, "sha256": sources.digest},
            machine=Machine.describe(),
            plan=plan,
            titles={one.name: one.title for one in field.participants if one.name not in measurement.failed},
            versions=field.versions,
            skipped=field.skipped | {**measurement.failed},
            measurement=measurement,
            reference=REFERENCE if REFERENCE in measurement.load_s else None,
        )
        if json_file is not None:
            json_file.write_bytes(report.to_json())
        show(report, console)
        if plot is not None:
            draw(report, plot)


@app.command("show")
def show_command(
    recorded: Annotated[Path, typer.Argument(help="What `peers --json` wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Draw decode and prefill here.")] = None,
) -> None:
    """Print a recorded comparison again."""
    with _failing_with_a_message():
        report = Report.read(recorded)
        show(report, _console())
        if plot is not None:
            draw(report, plot)


@app.command("host-time")
def host_time_command(
    bundle: Annotated[Path, typer.Argument(help="An engine bundle.", exists=True)],
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads.")] = None,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of each generation.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each with one generation of every case.")] = 5,
) -> None:
    """The time a decode step spends outside the session."""
    _print(host_time.table(host_time.measure_host_time(bundle, threads, tokens, rounds)))


@app.command("speculate")
def speculate_command(
    bundle: Annotated[Path, typer.Argument(help="An engine bundle of a chat model.", exists=True)],
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most so many tokens of each answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each with a pair of every prompt.")] = 7,
) -> None:
    """Decoding with prompt-lookup speculation against decoding without."""
    _print(speculate.table(speculate.measure_speculation(bundle, threads, tokens, rounds)))


def _print(table: Table) -> None:
    console = _console()
    console.print(str(Machine.describe()), style="dim", highlight=False)
    console.print(table)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200)


@contextmanager
def _failing_with_a_message() -> Iterator[None]:
    try:
        yield
    except BenchmarkError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
