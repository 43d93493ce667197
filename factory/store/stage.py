"""A stage: what decides its result, and its key."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from factory.artifacts import canonical_json

STAGES = ("measure", "plan", "search", "compare", "prune", "heal", "merge", "evaluate", "speed")
KEY = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class StageSpec:
    """What decides the result of a stage: equal specs give equal keys on every machine."""

    stage: str
    version: int  # raised when the stage's code gives other results
    parameters: Mapping[str, Any]  # JSON values that change the result
    inputs: Mapping[str, str]  # name → key or commit of what goes in

    @property
    def key(self) -> str:
        """First 16 hex digits of sha256 over the canonical JSON of the spec."""
        value = {
            "stage": self.stage,
            "version": self.version,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
        }
        return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
