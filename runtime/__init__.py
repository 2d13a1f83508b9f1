"""What runs in production: reads a bundle, drives an engine, turns tokens into text. Imports no torch and no onnx."""

from .pipeline import Pipeline
from .sampling import SamplingParams
from .sequence import Chunk, Completion, Timings
from .session import Session

__all__ = ["Chunk", "Completion", "Pipeline", "SamplingParams", "Session", "Timings"]
