"""Makes `checkpoint_files` importable, and writes an HF folder around a weight file."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def folder(tmp_path):
    """A function: model.safetensors as bytes -> an HF folder around it."""

    def write(data: bytes | None, **files: bytes) -> Path:
        place = tmp_path / "model"
        place.mkdir()
        (place / "config.json").write_text("{}")
        if data is not None:
            (place / "model.safetensors").write_bytes(data)
        for name, content in files.items():
            (place / name.replace("__", ".")).write_bytes(content)
        return place

    return write
