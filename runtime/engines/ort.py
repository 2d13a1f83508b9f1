"""The one import of onnxruntime. Its official builds report usage to their vendor from the import on; here they do not.

The variable must be set before the import, the call covers a process that had imported it already.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

onnxruntime.disable_telemetry_events()

__all__ = ["onnxruntime"]
