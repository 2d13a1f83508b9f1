"""A plan held to the graph contract: every tensor known, of the right type, and addressable row by row."""

from ... import EngineError
from .. import contract
from ..manifest import Contract
from .cuda_memory import ALIGNMENT
from .device_cache import StateLayout
from .trt_plan import Plan


def input_names(spec: Contract, plan: Plan) -> dict[str, str]:
    """Role -> name, of the token inputs that the plan has (TensorRT drops one that nothing reads).

    Raises:
        EngineError: the plan has a tensor that the contract does not know, lacks one, or has it in another type.
    """
    names = {tensor.role: tensor.name for tensor in spec.inputs}
    states = {name for state in spec.states for name in (state.input, state.output)}
    known = {*names.values(), *states, spec.logits.name}
    unknown = [name for name in (*plan.inputs, *plan.outputs) if name not in known]
    missing = [name for name in (*sorted(states), spec.logits.name) if name not in (*plan.inputs, *plan.outputs)]
    if names.get(contract.INPUT_IDS) not in plan.inputs:
        missing.append(contract.INPUT_IDS)
    if unknown or missing or spec.layout != contract.LAYOUT or names.keys() - contract.INPUTS.keys():
        raise EngineError(
            f"the plan does not fit the contract {spec.layout}: unknown {unknown or 'none'}, missing "
            f"{missing or 'none'}; use the zonda version that built it"
        )
    wanted = {names[role]: contract.INPUTS[role][0] for role in names} | {spec.logits.name: "float32"}
    wrong = [f"{name} is {plan.dtypes[name]}" for name in wanted if plan.dtypes.get(name, wanted[name]) != wanted[name]]
    if wrong:
        raise EngineError(f"the plan does not fit the contract: {', '.join(wrong)}")
    return {role: name for role, name in names.items() if name in plan.inputs}


def state_layouts(spec: Contract, plan: Plan) -> tuple[StateLayout, ...]:
    """The state tensors of a row as the plan holds them, in the contract's order.

    Raises:
        EngineError: the capacity is dynamic, or a row's address would not be aligned.
    """
    layouts = []
    for state in spec.states:
        _, heads, positions, dim = plan.shapes[state.input]
        layout = StateLayout(state.input, state.output, heads, positions, dim, plan.dtypes[state.input])
        if positions < 1:
            raise EngineError(f"{state.input}: the plan's cache has no static capacity")
        if layout.row_bytes % ALIGNMENT:
            raise EngineError(
                f"{state.input}: a row of {layout.row_bytes} bytes is no multiple of {ALIGNMENT}, so TensorRT cannot "
                "be given a row by its address; build with a --capacity and --max-chunk that are multiples of 128"
            )
        layouts.append(layout)
    return tuple(layouts)
