"""Zonda against its peers: same weights, same prompts, same threads, one interleaved run.

It knows Zonda only by its public face, as it knows every other runtime. Each runtime has one file in `peers/`, and a
process of its own (`worker.py`) that computes only while it is asked to. Nothing here is imported by the package.
"""


class BenchmarkError(Exception):
    """A comparison could not be made. Its message names the culprit and the remedy."""


class UnavailableError(BenchmarkError):
    """A peer cannot take part here; the others can. Its message is the reason that the report gives."""
