"""The command `zonda`: generate, chat, inspect, verify and bench on a bundle, and whatever other packages' rooms add.

Commands that need more than the runtime are entry points of the group `zonda.commands`; they are looked for and
imported only when they are called, so `zonda generate` never pays for torch, nor for what only prints tables.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import RequestError, TargetUnavailableError, ZondaError, __version__
from .sampling import SamplingParams
from .sequence import Chunk, Completion

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

    from rich.console import Console

_GROUP = "zonda.commands"


class _Commands(typer.core.TyperGroup):
    """The commands of this file and those of the entry points, loaded by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names only; nothing is imported."""
        return sorted({*super().list_commands(ctx), *_entry_points().names})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One command; an entry point's function is imported here."""
        command = super().get_command(ctx, cmd_name)
        if command is not None or cmd_name not in (points := _entry_points()).names:
            return command
        try:
            function = points[cmd_name].load()
        except ImportError as error:
            raise ZondaError(f"'zonda {cmd_name}' needs {error.name}: pip install 'zonda[build,cpu]'") from error
        extra = typer.Typer(add_completion=False)
        extra.command(name=cmd_name)(function)
        return typer.main.get_command(extra)


def _entry_points() -> "EntryPoints":
    from importlib import metadata

    return metadata.entry_points(group=_GROUP)


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

BundleArgument = Annotated[Path, typer.Argument(help="An engine bundle.")]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that hold this probability.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Penalty = Annotated[float | None, typer.Option(help="Repetition penalty; 1 is none.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")]
Threads = Annotated[
    int | None, typer.Option(envvar="ZONDA_THREADS", help="Compute threads; one a physical core if not given.")
]
Speculate = Annotated[
    str | None, typer.Option(metavar="ngram", help="Draft tokens from what was said before: same text, in less time.")
]
OnlyTarget = Annotated[str | None, typer.Option("--target", help="Only this target, or this kind of targets.")]
TargetOption = Annotated[str | None, typer.Option(help="Force a target of the bundle, by its name or its kind.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models compiled ahead of time."""


@app.command()
def generate(
    bundle: BundleArgument,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or none reads standard input.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Stop = None,
    threads: Threads = None,
    target: TargetOption = None,
    speculate: Speculate = None,
    timings: Annotated[bool, typer.Option("--timings", help="Print tokens per second on standard error.")] = False,
) -> None:
    """Continue a prompt, streaming to the terminal."""
    from .pipeline import Pipeline

    text = sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    with Pipeline.load(bundle, threads=threads, target=target, speculate=speculate) as pipeline:
        params = _params(
            pipeline.default_params,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop) if stop else None,
        )
        if timings:
            result = pipeline.generate(text, params)
            print(result.text)
            _print_timings(result)
        else:
            _write(pipeline.stream(text, params))


@app.command()
def chat(
    bundle: BundleArgument,
    system: Annotated[str | None, typer.Option(help="A system message in front of the conversation.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    threads: Threads = None,
    target: TargetOption = None,
    speculate: Speculate = None,
) -> None:
    """Talk to the model, one line a turn; Ctrl-C stops an answer, Ctrl-D or an empty line ends the conversation."""
    from .pipeline import Pipeline

    with Pipeline.load(bundle, threads=threads, target=target, speculate=speculate) as pipeline:
        params = _params(
            pipeline.default_params,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        session = pipeline.session()
        if system is not None:
            session.messages.append({"role": "system", "content": system})
        for line in _lines():
            chunks = session.stream(line, params)
            try:
                _write(chunks)
            except KeyboardInterrupt:
                chunks.close()  # type: ignore[attr-defined]
                print()


@app.command()
def inspect(
    bundle: BundleArgument,
    json_output: Annotated[bool, typer.Option("--json", help="The manifest, as JSON.")] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="The least time a token can take on some GPUs, by arithmetic.")
    ] = False,
) -> None:
    """Say what a bundle is and where it can run."""
    from .bundle import open_bundle
    from .inspection import inspection_page
    from .manifest import encode
    from .roofline import roofline_page

    opened = open_bundle(bundle)
    if json_output and roofline:
        raise RequestError("--json prints the manifest and --roofline a page: choose one")
    if json_output:
        sys.stdout.write(encode(opened.manifest).decode())
    else:
        _console().print(roofline_page(opened) if roofline else inspection_page(opened))


@app.command()
def verify(
    bundle: BundleArgument,
    target: OnlyTarget = None,
    quick: Annotated[bool, typer.Option("--quick", help="One prompt, about a second.")] = False,
    threads: Threads = None,
) -> None:
    """Prove on this host that a bundle is what was built and computes what the build recorded."""
    from .bundle import open_bundle
    from .loader import obstacle, open_engine, targets_of
    from .records import remember
    from .verification import in_words, prove_target

    console = _console(soft_wrap=True, highlight=False)
    opened = open_bundle(bundle, full=True)
    count, size = len(opened.manifest.files) + 1, sum(opened.manifest.files.values())
    console.print(f"{count} files, {size / 1e6:,.1f} MB: all as the build wrote them")
    proven, failures = 0, []
    for one in targets_of(opened, target):
        reason = obstacle(opened, one, forced=True)
        if reason is not None:
            console.print(f"{one.name}: not verified: {reason}", markup=False)
            continue
        try:
            with closing(open_engine(opened, one, opened.manifest.limits, threads)) as engine:
                parity = prove_target(opened, one, engine, quick=quick)
        except ZondaError as error:
            console.print(f"{one.name}: NOT proven", style="red", markup=False)
            failures.append(error)
            continue
        if not quick:
            remember(opened, one, parity)
        console.print(f"{one.name}: {in_words(parity)}", markup=False)
        proven += 1
    if failures:
        raise failures[0]
    if not proven:
        raise TargetUnavailableError(f"{bundle}: there was no target to verify on this host")


@app.command()
def bench(
    bundle: BundleArgument,
    target: OnlyTarget = None,
    batch: Annotated[int, typer.Option(help="Rows of the batch that is measured beside a single row.")] = 4,
    tokens: Annotated[int, typer.Option(help="New tokens of each request.")] = 64,
    repeat: Annotated[int, typer.Option(help="Rounds; in each every target is loaded and run once.")] = 5,
    threads: Threads = None,
    pick: Annotated[
        bool, typer.Option("--pick/--no-pick", help="Let this host prefer the fastest of two or more proven targets.")
    ] = True,
    json_output: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Everything measured, as JSON; - is standard output.")
    ] = None,
) -> None:
    """Measure the targets of a bundle on this host, and pick the fastest proven one."""
    import msgspec

    from .bench import bench as measure_all
    from .bench import make_plan
    from .bench_page import bench_page
    from .bundle import open_bundle
    from .loader import targets_of

    opened, messages = open_bundle(bundle), _console(stderr=True)
    targets = targets_of(opened, target)
    plan = make_plan(opened.manifest.limits, batch=batch, new_tokens=tokens, repeat=repeat, threads=threads)
    with messages.status("") as status:
        report = measure_all(opened, targets, plan, pick=pick, progress=status.update)
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"
    if json_output == "-":
        sys.stdout.write(encoded)
    else:
        _console().print(bench_page(report), markup=False, highlight=False)
        if json_output is not None:
            Path(json_output).write_text(encoded, "utf-8")
    if not any(not one.failure for one in report.targets):
        raise TargetUnavailableError(f"{bundle}: there was no target to measure on this host")


def main() -> None:
    """The entry point: typed errors become one line on standard error and exit status 1."""
    try:
        app()
    except ZondaError as error:
        _console(stderr=True).print("error:", str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None


def _console(**options: Any) -> "Console":
    from rich.console import Console

    return Console(**options)


def _params(default: SamplingParams, **options: Any) -> SamplingParams:
    """The bundle's defaults with what the command line says; a temperature of 0 also drops the sampling defaults."""
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("temperature") == 0:
        default = SamplingParams(temperature=0.0)
    return default.replace(**given)


def _write(chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _lines() -> Iterator[str]:
    """Turns of the user; a prompt is shown on a terminal only."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            sys.stdout.write("> ")
            sys.stdout.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line.strip():
            return
        yield line.rstrip("\n")


def _print_timings(result: Completion) -> None:
    t = result.timings
    drafts = f", {t.accepted_tokens} of {t.drafted_tokens} drafted tokens accepted" if t.drafted_tokens else ""
    _console(stderr=True).print(
        f"prefill {t.prompt_tokens} tokens at {t.prefill_tokens_per_s:.0f}/s, "
        f"decode {t.generated_tokens} tokens at {t.decode_tokens_per_s:.0f}/s{drafts}",
        highlight=False,
        soft_wrap=True,
    )
