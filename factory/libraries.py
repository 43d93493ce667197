"""Which libraries are installed here that the program can use: its dependencies, and theirs."""

import platform
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROGRAM = "hf-factory"


def installed_libraries(*, of: str = PROGRAM) -> dict[str, str]:
    """Name → version of every installed distribution below one, by its metadata; and Python's own.

    Optional dependencies count where an extra asks for them. What is not installed is left out.
    """
    found: dict[str, str] = {}
    left = [(canonicalize_name(of), frozenset[str]())]
    seen = set(left)
    while left:
        name, extras = left.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = package.version
        for text in package.requires or ():
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in extras or {""}]
            if needed.marker and not any(needed.marker.evaluate(env) for env in environments):
                continue
            entry = (canonicalize_name(needed.name), frozenset(needed.extras))
            if entry not in seen:
                seen.add(entry)
                left.append(entry)
    found.pop(canonicalize_name(of), None)
    return {"python": platform.python_version(), **dict(sorted(found.items()))}
