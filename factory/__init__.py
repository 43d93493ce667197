"""Make language models smaller: drop layers, heal the cut, measure what it costs, publish the result."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FactoryError", "build", "load", "plan", "preview", "prune", "sweep"]

if TYPE_CHECKING:
    from factory.api.functions import build, load, plan, preview, prune, sweep
    from factory.errors import FactoryError


def __getattr__(name: str) -> Any:
    """Load the Python interface when it is first used: `factory --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'factory' has no attribute {name!r}")
    from importlib import import_module

    module = "factory.errors" if name == "FactoryError" else "factory.api.functions"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
