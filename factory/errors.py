"""Every deliberate error: one line that says what is wrong with the value in it, and a hint."""

from functools import partial
from typing import Any

UNTRUSTED = "do not use this model unless you trust where it comes from"  # the hint on what no model needs


class FactoryError(Exception):
    """Base of all errors the user can do something about.

    Args:
        message: One line: what is wrong, with the offending value in it.
        hint: One line: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its hint: a process hands it to the one that started it."""
        return partial(type(self), hint=self.hint), (self.message,)


class UsageError(FactoryError):
    """The command line or a configuration value cannot mean anything."""

    exit_code = 2


class UnknownModelError(UsageError):
    """A model reference that is no alias, no folder and no repository name."""


class DropError(UsageError):
    """`drop` or a set of layers that leaves no usable model."""


class DataError(FactoryError):
    """A data file or data set that is missing, empty or malformed."""


class ModelError(FactoryError):
    """A model that the factory cannot work on."""


class UnsupportedArchitectureError(ModelError):
    """No decoder stack found, or one whose layers cannot be removed safely."""


class UnsupportedFieldError(ModelError):
    """A configuration field that cannot be proved right after removal of layers."""


class CheckpointError(ModelError):
    """Weights that are missing, damaged, hostile or in a format that is not read."""


class VerificationError(ModelError):
    """An artefact that differs from what it must be."""


class OverflowedError(VerificationError):
    """Weights that are infinite or not a number."""


class HubError(FactoryError):
    """The Hub said no, could not be reached, or returned something else than it promised."""


class LicenseError(FactoryError):
    """A licence that forbids what was asked."""


class DiskSpaceError(FactoryError):
    """Too little disk for the build."""


class MachineError(FactoryError):
    """The machine lacks what the build needs: memory, or 4-bit arithmetic."""


class StoreError(FactoryError):
    """A stage or build folder that cannot be used."""


class HealingError(FactoryError):
    """Training diverged, or made the model worse where that is not acceptable."""


class WorkerError(FactoryError):
    """One of several processes ended without saying why."""
