"""Define the stages of a build, one row each, and their keys.

Only the standard library is imported, so that `--help` stays fast.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from factory.artifacts import (
        Adapter,
        Artifact,
        Checkpoint,
        CutLosses,
        DistanceProfile,
        Evaluation,
        PruningPlan,
        SpeedComparison,
    )

KEY = re.compile("[0-9a-f]{16}")
PACES = "paces"  # folder beside the stages: times of passes, for estimates; taken again where missing
LOGS = "logs"  # folder beside the stages: what runs logged
A = TypeVar("A", bound="Artifact")


@dataclass(frozen=True)
class Stage(Generic[A]):
    """Description of a stage for the store, the runner and the command line."""

    name: str  # part of its key
    version: int  # raised when its code gives other results for the same input; part of its key
    makes: str  # class of its value in `factory.artifacts`, a module that takes long to import
    libraries: tuple[str, ...] = ()  # their versions can change its numbers, and are part of its key
    resumable: bool = False  # resumes from what an interrupted attempt left
    can_rerun: bool = True  # by --rerun
    reads_text: bool = False
    loads_source: bool = False  # the unchanged weights
    scratch: tuple[str, ...] = ()  # patterns of files that are useless once its value is written
    local: tuple[str, ...] = ()  # top-level files that are useful only on this machine

    @property
    def artifact(self) -> "type[A]":
        """Return the class of its value."""
        artifact: type[A] = getattr(import_module("factory.artifacts"), self.makes)
        return artifact


ASSEMBLE: "Stage[Checkpoint]" = Stage("assemble", version=1, makes="Checkpoint", can_rerun=False)
MEASURE: "Stage[DistanceProfile]" = Stage(
    "measure",
    version=5,
    makes="DistanceProfile",
    libraries=("torch", "transformers", "bitsandbytes"),
    resumable=True,
    reads_text=True,
    loads_source=True,
)
PLAN: "Stage[PruningPlan]" = Stage("plan", version=2, makes="PruningPlan")
SEARCH: "Stage[PruningPlan]" = Stage(
    "search",
    version=3,
    makes="PruningPlan",
    libraries=("torch", "transformers", "bitsandbytes"),
    resumable=True,
    reads_text=True,
    loads_source=True,
)
COMPARE: "Stage[CutLosses]" = Stage(
    "compare",
    version=3,
    makes="CutLosses",
    libraries=("torch", "transformers", "bitsandbytes"),
    can_rerun=False,  # only in `factory plan`
    reads_text=True,
    loads_source=True,
)
PRUNE: "Stage[Checkpoint]" = Stage("prune", version=5, makes="Checkpoint")
HEAL: "Stage[Adapter]" = Stage(
    "heal",
    version=9,
    makes="Adapter",
    libraries=("torch", "transformers", "trl", "peft", "bitsandbytes"),
    resumable=True,
    reads_text=True,
    scratch=("trainer*", "tokens", "slowed.json", "seam.*"),
    local=("tokens",),  # a cache that holds paths
)
MERGE: "Stage[Checkpoint]" = Stage("merge", version=3, makes="Checkpoint")
EVALUATE: "Stage[Evaluation]" = Stage(
    "evaluate",
    version=5,
    makes="Evaluation",
    libraries=("torch", "transformers", "lm_eval"),
    resumable=True,
    reads_text=True,
    loads_source=True,
)
SPEED: "Stage[SpeedComparison]" = Stage(
    "speed",
    version=3,
    makes="SpeedComparison",
    libraries=("torch", "transformers"),
    loads_source=True,
)
# In the order of a build.
STAGES: Mapping[str, Stage[Any]] = {
    stage.name: stage
    for stage in (ASSEMBLE, MEASURE, PLAN, SEARCH, COMPARE, PRUNE, HEAL, MERGE, EVALUATE, SPEED)
}
MADE_BY = {"pruned": PRUNE.name, "healed": MERGE.name}  # model → the stage that wrote it


@dataclass(frozen=True)
class StageSpec:
    """Everything that determines the result of a stage; equal specs have equal keys on every machine."""

    stage: str
    version: int  # raised when the stage's code gives other results
    parameters: Mapping[str, Any]  # JSON values that change the result
    inputs: Mapping[str, str]  # name → key or commit of an input

    @property
    def key(self) -> str:
        """Return the first 16 hex digits of the sha256 of the spec's canonical JSON."""
        from factory.artifacts import canonical_json

        value = {
            "stage": self.stage,
            "version": self.version,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
        }
        return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
