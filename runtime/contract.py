"""The graph contract: names, roles and shapes of what goes into an engine's step and what comes out.

Every graph that `export` writes and every engine that `runtime` drives agrees on these; the manifest of a bundle
repeats them, so that a reader needs nothing but the manifest.
"""

LAYOUT = "contiguous-1"

INPUT_IDS = "input_ids"  # (B, S) int64, right-padded new tokens
SEQLEN_OFFSETS = "seqlen_offsets"  # (B,) int32, tokens already cached in this row
START_OFFSETS_KERNEL = "start_offsets_kernel"  # (B, S) int64, absolute position of each new token
INPUT_LENS = "input_lens"  # (B,) int32, valid new tokens in this row, 0 for an idle row
LOGIT_POSITIONS = "logit_positions"  # (B, K) int64, which of the S tokens want logits
LOGITS = "logits"  # (B, K, V) float32

BATCH, SEQUENCE, CAPACITY, NUM_LOGITS = "batch", "sequence", "capacity", "num_logits"

INPUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    INPUT_IDS: ("int64", (BATCH, SEQUENCE)),
    SEQLEN_OFFSETS: ("int32", (BATCH,)),
    START_OFFSETS_KERNEL: ("int64", (BATCH, SEQUENCE)),
    INPUT_LENS: ("int32", (BATCH,)),
    LOGIT_POSITIONS: ("int64", (BATCH, NUM_LOGITS)),
}
"""Role of each token input -> (dtype, dimensions)."""


def state_names(layer: int, kind: str) -> tuple[str, str]:
    """Names of a cache buffer as input and as output; kind is `key` or `value`."""
    return f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
