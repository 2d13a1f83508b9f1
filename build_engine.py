"""Compile a checkpoint into an engine bundle: `python build_engine.py MODEL -o OUT`, or `zonda build`.

This file parses arguments and says in which order the steps run; what the steps do lies in `models` and `export`.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from zonda import BuildError, ParityError, ZondaError
from zonda.runtime.manifest import Limits

if TYPE_CHECKING:
    from zonda.export.tensorrt_target import PlanOptions

DEFAULT_CAPACITY = 4096
TARGETS = ("onnxruntime", "tensorrt-rtx", "tensorrt")
QUALITIES = ("exact", "balanced", "fast")
CACHES = ("float32", "int8")
QUANTS = ("none", "int8", "int4")
CHUNKS = {"exact": 256, "balanced": 256, "fast": 192}
"""New tokens of a row in one step, by quality. Attention computes the whole square of a chunk, half of it for nothing,
and where the linears are cheaper that weighs more."""
DTYPES: dict[str, Literal["float16", "bfloat16"]] = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What the command line says. capacity 0 is min(max_position_embeddings, 4096), max_chunk 0 what suits the quality.

    lora: each `PATH[:scale]`. compute_capabilities, dtype, plugins: of the TensorRT targets, a
    plan for each entry of plugins.
    """

    targets: tuple[str, ...] = ("onnxruntime",)
    quality: str = "balanced"
    kv: str = "float32"
    quant: str = "none"
    capacity: int = 0
    max_batch: int = 8
    max_chunk: int = 0
    revision: str | None = None
    offline: bool = False
    lora: tuple[str, ...] = ()
    overwrite: bool = False
    dry_run: bool = False
    verify: str = "strict"
    reference: str = "eager"
    compute_capabilities: tuple[int, ...] = ()
    dtype: str = "fp16"
    plugins: tuple[str, ...] = ("all",)


class Steps:
    """Says on a terminal which step runs and how long each took; says nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Time one step; a spinner while it runs."""
        started = time.perf_counter()
        if self._console.is_terminal:
            with self._console.status(title):
                yield
            self._console.print(f"  {title} [dim]{time.perf_counter() - started:.1f} s[/dim]")
        else:
            yield


def build_bundle(model: str, output: Path, options: BuildOptions, console: Console) -> Path | None:
    """Run the steps; return the bundle's path, None after a dry run.

    Raises:
        ZondaError: whatever went wrong; no bundle was written, and one that was there is untouched.
    """
    import torch

    from zonda.export import calibration, describe, device_plan, plan, proof, tensorrt_target, universal
    from zonda.export import onnx_files as files
    from zonda.export.bundle import list_files, refuse_existing, seal, staged
    from zonda.export.lower import onnxruntime as lower
    from zonda.export.lower.int8 import SHORTEST_PREFILL
    from zonda.export.transformers_reference import prove_eager
    from zonda.models import registry
    from zonda.models.checkpoints import fetch, open_checkpoint
    from zonda.models.checkpoints.lora import merge_adapters, parse_lora
    from zonda.models.loading import check_sizes, match_parameters
    from zonda.models.quantize import is_quantized, quantize_modules, quantize_norms, quantized_forms
    from zonda.models.quantize_floats import quantized
    from zonda.models.stacking import stacked
    from zonda.runtime.metrics import THRESHOLDS

    plans = _tensorrt_plans(options)
    _check(options)
    steps = Steps(console)
    if not options.dry_run:
        refuse_existing(output, overwrite=options.overwrite)
    revision = fetch(model, revision=options.revision, offline=options.offline)  # shows its own progress
    with steps.step("read the checkpoint"):
        checkpoint = open_checkpoint(model, revision=revision, offline=True)
        checkpoint = merge_adapters(checkpoint, [parse_lora(text) for text in options.lora])
        architecture = registry.of_config(checkpoint.config)
        checkpoint = stacked(checkpoint, architecture.stacks)
        check_sizes(checkpoint)
        config = architecture.read_config(checkpoint.config)
        limits = _limits(config.max_position_embeddings, config.vocab_size, options)
        with torch.device("meta"):
            module = architecture.for_rows(config, limits.capacity, limits.max_chunk)
        checkpoint = quantized(checkpoint, module, options.quant, output.absolute().parent)
        with torch.device("meta"):
            if options.quality != "exact":
                quantize_modules(module, quantized_forms(module, checkpoint))
        dequantised = quantize_norms(module, checkpoint)
        names = match_parameters(module, checkpoint, architecture.ignored)
    if dequantised:
        words = f"{len(dequantised)} norms are stored in blocks and computed in float32, the first {dequantised[0]}"
        console.print(words, markup=False, highlight=False)
    quality = options.quality if is_quantized(module) else "exact"
    if options.lora:
        console.print(f"merged {len(options.lora)} adapters: {checkpoint.source.format}", markup=False, highlight=False)
    if quality == "fast" and limits.max_chunk < SHORTEST_PREFILL:
        raise BuildError(
            f"--quality fast is for steps of {SHORTEST_PREFILL} tokens and more; with chunks of {limits.max_chunk} "
            "there are none: raise --max-chunk and --capacity, or use --quality balanced"
        )
    estimate = plan.make_plan(module, limits, quality, kv=options.kv, quantizes=options.quant != "none")
    devices = [device_plan.make_device_plan(module, limits, wanted.name) for wanted in plans]
    if options.dry_run:
        console.print(describe.plan_page(estimate, checkpoint, limits, devices), highlight=False)
        return None
    estimate.require(output.absolute().parent)
    others_bytes = estimate.bundle
    for device in devices:
        device.require(output.absolute().parent, others_bytes)
        others_bytes += device.plan
    with staged(output.absolute(), overwrite=options.overwrite) as staging:
        with steps.step("export to ONNX"):
            graph = universal.export_universal(module)
        lowered = None
        if "onnxruntime" in options.targets:
            with steps.step("lower for ONNX Runtime"):
                lowered = lower.lower(graph, quality)
        load = files.tensor_source(module, checkpoint, names)
        if lowered is not None and options.kv == "int8":
            with steps.step("calibrate the KV cache"):
                texts = calibration.calibration_prompts(proof.tokenizer_of(checkpoint), limits)
                lowered = lower.with_int8_cache(lowered, calibration.eager_states(module, load, texts))
        others = []
        for wanted in plans:
            with steps.step(f"build {wanted.name}"):
                made = tensorrt_target.add_target(
                    staging, graph, load, limits, proof.unproven_target(options.verify), wanted
                )
            others.append(made)
            for warning in made.warnings:
                console.print(f"{made.name} warns: {warning}", style="yellow", markup=False, highlight=False)
        with steps.step("write the weights"):
            files.write(staging, graph, lowered, load)
        with steps.step("check the graphs"):
            files.check(staging)
        files.write_texts(staging, checkpoint)
        proven = proof.unproven("off", "the build was told --verify off")
        if options.verify != "off":
            with steps.step("run the eager model"):
                recorded = proof.record(staging, module, checkpoint, load, limits, lowered)
            proven = proof.unproven("pending", estimate.why_not_provable, recorded.weights)
            if estimate.provable:
                try:
                    with steps.step("prove the engine against the eager model"):
                        proven = proof.prove(staging, recorded, module, limits, quality)
                except ParityError as error:
                    if lowered is None:
                        raise
                    from zonda.export import compare

                    with steps.step("find where they part"):
                        spec = describe.make_contract(module.kv_shapes, limits.vocab_size)
                        prompts = recorded.prompts
                        finding = compare.locate_in_build(staging, module, load, spec, limits, prompts, quality)
                    raise compare.explain(error, finding) from error
            if options.reference == "transformers":
                with steps.step("prove the eager model against transformers"):
                    revision = checkpoint.source.revision
                    proven = proven.with_reference(prove_eager(model, revision, recorded.exact, THRESHOLDS["float32"]))
            recorded.exact.unlink()
        with steps.step("seal the bundle"):
            manifest = describe.make_manifest(
                checkpoint,
                architecture.names[0],
                module,
                limits,
                proven.target if lowered is not None else None,
                proven.universal,
                list_files(staging),
                others,
                quality,
            )
            seal(staging, manifest)
    return output


def _tensorrt_plans(options: BuildOptions) -> "list[PlanOptions]":
    """The TensorRT plans asked for: of every target, one for each choice of plugins.

    Raises:
        BuildError: an option is impossible.
    """
    from zonda.export.lower.tensorrt import parse_plugins
    from zonda.export.tensorrt_build import check_capabilities
    from zonda.export.tensorrt_target import PlanOptions

    for target in options.targets:
        if target not in TARGETS:
            raise BuildError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    if not options.targets or len(set(options.targets)) != len(options.targets):
        raise BuildError(f"--target names each target once, at least one; found {', '.join(options.targets) or 'none'}")
    if options.dtype not in DTYPES:
        raise BuildError(f"--dtype is {' or '.join(DTYPES)}, found {options.dtype!r}")
    plugins = [parse_plugins(text) for text in options.plugins]
    if not plugins or len(set(plugins)) != len(plugins):
        raise BuildError(
            f"--plugins names each choice once, at least one; found {' and '.join(options.plugins) or 'none'}"
        )
    chosen = [target for target in options.targets if target != "onnxruntime"]
    if not chosen and (options.compute_capabilities, options.dtype, options.plugins) != ((), "fp16", ("all",)):
        raise BuildError("--compute-capability, --dtype and --plugins are of a TensorRT target; ask for one: --target")
    dtype, capabilities = DTYPES[options.dtype], options.compute_capabilities
    for target in chosen:
        check_capabilities(target, capabilities, dtype)
    return [PlanOptions(target, dtype, capabilities, choice) for target in chosen for choice in plugins]


def _check(options: BuildOptions) -> None:
    """Raise `BuildError` if an option that is not of TensorRT is impossible, by itself or beside another."""
    if options.quality not in QUALITIES:
        raise BuildError(f"--quality is one of {', '.join(QUALITIES)}, found {options.quality!r}")
    if options.kv not in CACHES:
        raise BuildError(f"--kv is {' or '.join(CACHES)}, found {options.kv!r}")
    if options.kv == "int8" and options.targets != ("onnxruntime",):
        raise BuildError("--kv int8 is of the target onnxruntime; build the others into a bundle of their own")
    if options.verify not in ("strict", "off"):
        raise BuildError(f"--verify is strict or off, found {options.verify!r}")
    if options.reference not in ("eager", "transformers"):
        raise BuildError(f"--reference is eager or transformers, found {options.reference!r}")
    if options.reference == "transformers" and options.verify == "off":
        raise BuildError("--reference transformers is part of the proof, and --verify off asks for none")
    if options.reference == "transformers" and options.lora:
        raise BuildError("--reference transformers reads the checkpoint without adapters; build without --lora")
    _check_quant(options)


def _check_quant(options: BuildOptions) -> None:
    """Raise `BuildError` if --quant is impossible, by itself or beside another option."""
    if options.quant not in QUANTS:
        raise BuildError(f"--quant is one of {', '.join(QUANTS)}, found {options.quant!r}")
    if options.quant == "none":
        return
    if options.quality == "exact":
        raise BuildError(
            "--quality exact holds all weights in float32, so --quant would cost precision and save nothing; choose one"
        )
    if options.reference == "transformers":
        raise BuildError(
            "--reference transformers reads the checkpoint's weights as they are; build without --quant to prove the "
            "eager model, then with it"
        )


def _capabilities(text: str) -> tuple[int, ...]:
    """`80,86,120` or `8.0,8.6,12.0` as numbers."""
    found = [part.strip().replace(".", "") for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in found):
        raise BuildError(f"--compute-capability is a list as 80,86,89,120; found {text!r}")
    return tuple(dict.fromkeys(map(int, found)))


def _limits(max_positions: int, vocab_size: int, options: BuildOptions) -> Limits:
    capacity = options.capacity or min(max_positions, DEFAULT_CAPACITY)
    if capacity > max_positions:
        raise BuildError(f"--capacity {capacity} is more than the {max_positions} positions that the model knows")
    chunk = options.max_chunk or CHUNKS[options.quality]
    for name, value in (("capacity", capacity), ("max-batch", options.max_batch), ("max-chunk", chunk)):
        if value < 1:
            raise BuildError(f"--{name} must be at least 1, found {value}")
    return Limits(capacity=capacity, max_batch=options.max_batch, max_chunk=min(chunk, capacity), vocab_size=vocab_size)


def build(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a .gguf file, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the bundle goes.")],
    target: Annotated[
        list[str] | None,
        typer.Option(help=f"One of: {', '.join(TARGETS)}; may be repeated. onnxruntime if none is named."),
    ] = None,
    quality: Annotated[
        str,
        typer.Option(
            help="Of ONNX Runtime's arithmetic on block-quantised weights. exact: float32. balanced: 8-bit activations."
            " fast: in prefill 8-bit weights, too."
        ),
    ] = "balanced",
    kv: Annotated[
        str, typer.Option(help="What the KV cache of ONNX Runtime holds: float32, or int8, a quarter of it.")
    ] = "float32",
    quant: Annotated[
        str,
        typer.Option(help="Of weights in floats: int8, int4 (8 bits where it matters most) or none. Needs no data."),
    ] = "none",
    capacity: Annotated[
        int, typer.Option(help=f"Tokens a row can hold; 0 is what the model knows, {DEFAULT_CAPACITY} at most.")
    ] = 0,
    max_batch: Annotated[int, typer.Option(help="Rows in one step.")] = 8,
    max_chunk: Annotated[
        int, typer.Option(help="New tokens of a row in one step; 0 is 256, and 192 for the quality fast.")
    ] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is in the local hub cache.")] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:SCALE]", help="A LoRA adapter (PEFT folder) to merge; may be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict sizes and memory, then stop.")] = False,
    verify: Annotated[
        str, typer.Option(help="strict: prove the engine against the eager model; off: do not, and record it.")
    ] = "strict",
    reference: Annotated[
        str, typer.Option(help="eager, or transformers: prove the eager model as well, with its whole float32 weights.")
    ] = "eager",
    compute_capability: Annotated[
        str, typer.Option(help="Of the GPUs that a TensorRT plan is for, e.g. 80,86,89,120.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Of a TensorRT plan: fp16 or bf16.")] = "fp16",
    plugins: Annotated[
        list[str] | None,
        typer.Option(
            help="Kernels of our own in a TensorRT plan: all (the default), none, or a list as RmsNorm,RoPE. May be "
            "repeated for one plan each, of which `zonda bench` picks the fastest."
        ),
    ] = None,
) -> None:
    """Compile MODEL into an engine bundle."""
    signal.signal(signal.SIGTERM, _terminated)
    console = Console(stderr=True)
    try:
        options = BuildOptions(
            targets=tuple(target or ("onnxruntime",)),
            quality=quality,
            kv=kv,
            quant=quant,
            capacity=capacity,
            max_batch=max_batch,
            max_chunk=max_chunk,
            revision=revision,
            offline=offline,
            lora=tuple(lora or ()),
            overwrite=overwrite,
            dry_run=dry_run,
            verify=verify,
            reference=reference,
            compute_capabilities=_capabilities(compute_capability),
            dtype=dtype,
            plugins=tuple(plugins or ("all",)),
        )
        bundle = build_bundle(model, output, options, Console() if dry_run else console)
    except ImportError as error:
        console.print(f"error: {error.name or error} is missing: pip install 'zonda\\[build,cpu]'", style="red")
        raise typer.Exit(1) from error
    except ZondaError as error:
        console.print("error:", str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("interrupted; no bundle was written", style="red")
        raise typer.Exit(130) from None
    if bundle is not None:
        print(bundle)


def _terminated(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Leave through the same clean-up as Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(build)
    sys.exit(app())
