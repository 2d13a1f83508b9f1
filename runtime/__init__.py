"""What runs in production: reads a bundle, drives an engine, turns tokens into text. Imports no torch and no onnx."""

from .generation import Chunk, Completion, Timings
from .pipeline import Pipeline
from .sampling import SamplingParams
from .session import Session

__all__ = ["Chunk", "Completion", "Pipeline", "SamplingParams", "Session", "Timings"]
