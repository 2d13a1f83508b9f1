"""The command line: `python -m benchmarks peers MODEL.gguf BUNDLE`, and `host-time` and `speculate` for one bundle.

What is measured against peers, and how, for every runtime alike (`worker.py` reads all clocks):

- prefill tok/s: prompt tokens / time from the moment the request's state is allocated to the first token;
- first token ms: from the request to the first token, the allocation of that state included;
- decode tok/s: (new tokens - 1) / time from the first token to the last;
- load s: importing the runtime and loading model and tokenizer, in an interpreter that already runs;
- peak RSS: of the runtime's process, after all its runs.

Decoding is greedy, always the same number of tokens, through end tokens.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import BenchmarkError, UnavailableError, host_time, speculate
from .interleaved import Participant, Plan, measure
from .machine import Machine
from .peer import Peer, Sources
from .peers import PEERS
from .prompts import text_ids
from .report import Report

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Zonda against its peers, and against itself."""


@app.command()
def peers(
    model: Annotated[Path, typer.Argument(help="The GGUF file all runtimes get their weights from.", exists=True)],
    bundle: Annotated[Path | None, typer.Argument(help="Zonda's bundle, compiled from it.", exists=True)] = None,
    prompt: Annotated[list[int], typer.Option(min=1, help="A prompt length in tokens; repeat for more.")] = [32, 512],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Rounds, each with one run of every runtime.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of every runtime.")] = 2,
    loads: Annotated[int, typer.Option(min=1, help="How often to load each runtime.")] = 3,
    peer: Annotated[list[str], typer.Option(help="A runtime; the first is compared with the others.")] = [*PEERS],  # noqa: B006
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
    work: Annotated[Path, typer.Option(help="Where the peers' inputs are made and kept.")] = Path("out/bench"),
    peers_python: Annotated[Path, typer.Option(help="The interpreter of the peers' environment.")] = Path(
        ".venv-bench/bin/python"
    ),
) -> None:
    """Compare runtimes on the same weights and prompts, in one interleaved run."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    # absolute, not resolved: a virtual environment's interpreter is a link, and is known by the link's place
    sources = Sources(model.absolute(), bundle and bundle.absolute(), work.absolute(), peers_python.absolute())
    try:
        chosen = {name: _known(name) for name in peer}
        participants, versions, skipped = _prepare(chosen, sources, console)
        ids = text_ids([one.model for one in participants])
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        plan = Plan(tuple(prompt), new_tokens, pairs, threads, loads, ids)
        with console.status("start") as status:
            measurement = measure(participants, plan, sources.work / "logs", status.update)
    except BenchmarkError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    report = Report(
        subject=participants[0].name,
        model={"name": model.name, "sha256": sources.digest},
        machine=Machine.describe(),
        plan=plan,
        titles={one.name: chosen[one.name].title for one in participants},
        versions=versions,
        skipped=skipped,
        measurement=measurement,
    )
    report.print(console)
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n")


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
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(str(Machine.describe()), style="dim", highlight=False)
    console.print(table)


def _known(name: str) -> Peer:
    if name not in PEERS:
        raise typer.BadParameter(f"unknown runtime {name!r}; known: {', '.join(PEERS)}")
    return PEERS[name]


def _prepare(
    chosen: dict[str, Peer], sources: Sources, console: Console
) -> tuple[list[Participant], dict[str, dict[str, str]], dict[str, str]]:
    """Make what the runtimes load: those that can take part, their versions, and why the others cannot."""
    participants, versions, skipped = [], {}, {}
    for name, one in chosen.items():
        try:
            found = one.versions(sources)
            with console.status(f"prepare {name}"):
                model = one.prepare(sources)
        except UnavailableError as reason:
            skipped[name] = str(reason)
            continue
        versions[name] = found
        participants.append(Participant(name, (one.python(sources), "-m", "benchmarks.worker", name), model))
    if not participants:
        raise BenchmarkError("no runtime can take part:\n" + "\n".join(f"{n}: {why}" for n, why in skipped.items()))
    return participants, versions, skipped


if __name__ == "__main__":
    app()
