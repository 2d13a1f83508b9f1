"""Single steps of an engine, as tests ask for them."""

import numpy as np


def decode(engine, cache, tokens, offset, first_row=0):
    """One token a row."""
    batch = len(tokens)
    ids, offsets = np.array(tokens, np.int64)[:, None], np.full(batch, offset, np.int32)
    ones, zeros = np.ones(batch, np.int32), np.zeros((batch, 1), np.int64)
    return engine.step(cache, first_row, ids, offsets, ones, zeros).copy()


def prefill(engine, cache, tokens, row=0, offset=0):
    ids, length = np.array([tokens], np.int64), len(tokens)
    last = np.array([[length - 1]])
    return engine.step(cache, row, ids, np.array([offset], np.int32), np.array([length], np.int32), last).copy()
