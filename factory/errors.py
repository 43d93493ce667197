"""Define every deliberate error: one line that says what is wrong, with the value in it, and a hint."""

from functools import partial
from typing import Any

UNTRUSTED = "do not use this model unless you trust its origin"  # hint for values that no model needs


class FactoryError(Exception):
    """Base of all errors that the user can do something about.

    Args:
        message: One line that says what is wrong, with the offending value in it.
        hint: One line that says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with its hint: worker processes pass it to the main one."""
        return partial(type(self), hint=self.hint), (self.message,)


class UsageError(FactoryError):
    """An invalid command line or configuration value."""

    exit_code = 2


class UnknownModelError(UsageError):
    """A model reference that is not an alias, a folder or a repository name."""


class DropError(UsageError):
    """A fraction or set of layers to drop that leaves no usable model."""


class DataError(FactoryError):
    """A data file or data set that is missing, empty or malformed."""


class ModelError(FactoryError):
    """A model that the factory cannot work on."""


class UnsupportedArchitectureError(ModelError):
    """A model without a decoder stack, or with one whose layers cannot be removed safely."""


class UnsupportedFieldError(ModelError):
    """A configuration field that cannot be proved right after layers are removed."""


class CheckpointError(ModelError):
    """Weights that are missing, damaged, hostile or in an unsupported format."""


class VerificationError(ModelError):
    """An artefact that differs from what it must be."""


class OverflowedError(VerificationError):
    """Weights that are infinite or not a number."""


class HubError(FactoryError):
    """A refusal by the Hub, no connection to it, or a file that is not what it announced."""


class LicenseError(FactoryError):
    """A licence that forbids publishing the result."""


class DiskSpaceError(FactoryError):
    """Too little disk for the build."""


class MachineError(FactoryError):
    """The machine lacks what the build needs: memory, or 4-bit arithmetic."""


class StoreError(FactoryError):
    """A stage or build folder that cannot be used."""


class HealingError(FactoryError):
    """Training that diverged, or made the model worse where that is not acceptable."""


class WorkerError(FactoryError):
    """A worker process that ended without an error message."""
