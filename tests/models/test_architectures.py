"""Every architecture in all six scenarios: eager, universal ONNX and the lowered engine against transformers.

Random two-layer models go through files, so the names and forms are those of real checkpoints.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from architecture_configs import CAPACITY, CHUNK, CONFIGS, ROWS, VOCAB, class_name, make_reference
from support import (
    RELATIVE_TOLERANCE,
    SCENARIOS,
    Eager,
    Lowered,
    PlainOnnx,
    export_graphs,
    open_engine,
    run_for_last_tokens,
    run_scenario,
)

from zonda.export.onnx_files import tensor_source
from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import load_weights, match_parameters
from zonda.models.stacking import stacked

CASES = [(family, name) for family, configs in CONFIGS.items() for name in configs]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request, tmp_path_factory):
    """(reference logits of 4 rows, tokens, executors by name) of one configuration."""
    family, name = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    hf = make_reference(family, CONFIGS[family][name])
    hf.save_pretrained(folder)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (4, 32))
    with torch.no_grad():
        reference = hf(torch.from_numpy(tokens)).logits.numpy()
    checkpoint = open_checkpoint(folder)
    architecture = registry.of_config(checkpoint.config)
    checkpoint = stacked(checkpoint, architecture.stacks)
    config = architecture.read_config(checkpoint.config)
    with torch.device("meta"):
        eager = architecture.build(config, ROWS).eval()
    names = match_parameters(eager, checkpoint, architecture.ignored)
    load_weights(eager, checkpoint, architecture.ignored)
    directory = tmp_path_factory.mktemp("graphs")
    load = tensor_source(eager, checkpoint, names)
    module = export_graphs(directory, lambda rows: architecture.build(config, rows), load, ROWS)
    engine = open_engine(directory, module, VOCAB, capacity=CAPACITY, max_chunk=CHUNK)
    executors = {
        "eager": lambda rows: Eager(eager, rows, ROWS),
        "universal": lambda rows: PlainOnnx(directory / "onnx/universal.onnx", module.kv_shapes, rows, ROWS),
        "lowered": lambda rows: Lowered(engine, rows),
    }
    return reference, tokens, executors


@pytest.mark.parametrize("execution", ["eager", "universal", "lowered"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_scenario(case, execution, scenario):
    reference, tokens, executors = case
    steps = SCENARIOS[scenario]
    rows = len(steps[0])
    found = run_scenario(executors[execution](rows), tokens[:rows], steps)
    tolerance = RELATIVE_TOLERANCE * np.abs(reference).max()
    for row, logits in enumerate(found):
        np.testing.assert_allclose(logits, reference[row, : len(logits)], rtol=0, atol=tolerance)


@pytest.mark.parametrize("scenario", ["ragged batch of 4", "chunked prefill", "batch with idle rows"])
def test_asking_for_the_last_token_alone_changes_no_logit(case, scenario):
    reference, tokens, executors = case
    steps = SCENARIOS[scenario]
    rows = len(steps[0])
    tolerance = RELATIVE_TOLERANCE * np.abs(reference).max()
    for row, position, logits in run_for_last_tokens(executors["lowered"](rows), tokens[:rows], steps):
        np.testing.assert_allclose(logits, reference[row, position], rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_file_is_short(family):
    path = Path(registry.__file__).with_name(f"{family.removesuffix('_text')}.py")
    assert len(path.read_text().splitlines()) <= 200


def test_every_architecture_is_tested():
    names = {name for architecture in registry.ARCHITECTURES for name in architecture.names}
    assert names == {class_name(family) for family in CONFIGS}
