"""What a comparison found, as JSON: every run, and what follows from them."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import msgspec

from . import BenchmarkError
from .interleaved import Measurement
from .machine import Machine
from .plan import Plan
from .summary import Comparison, compare

SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison of `subject` with the others.

    model: name and sha256 of the weights. titles and versions: by peer. skipped: peer -> why it took no part.
    reference: whose logits are the reference of quality, None where nobody's are.
    """

    subject: str
    model: dict[str, str]
    machine: Machine
    plan: Plan
    titles: dict[str, str]
    versions: dict[str, dict[str, str]]
    skipped: dict[str, str]
    measurement: Measurement
    reference: str | None = None
    schema: int = SCHEMA

    def comparisons(self) -> list[Comparison]:
        """Every peer in every case."""
        return compare(self.measurement.counted(self.plan.pairs), self.subject)

    def to_json(self) -> bytes:
        """Everything, the single runs included; seconds, MB (10⁶ bytes) and tokens."""
        content = msgspec.to_builtins(self, str_keys=True)
        content["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        content["comparisons"] = msgspec.to_builtins(self.comparisons())
        return msgspec.json.encode(content) + b"\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """A recorded comparison.

        Raises:
            BenchmarkError: the file cannot be read, or is not what `to_json` of this version writes.
        """
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise BenchmarkError(f"{path} cannot be read: {error}") from error
        except msgspec.DecodeError as error:
            raise BenchmarkError(f"{path} is not a recorded comparison: {error}") from error
        if found.schema != SCHEMA:
            raise BenchmarkError(f"{path} has schema {found.schema}; this version reads {SCHEMA}: measure again")
        return found
