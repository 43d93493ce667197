"""What the licences of a model say about publishing what is made from it, as far as its card tells."""

import re
from collections.abc import Iterator

from factory.artifacts import Source
from factory.errors import LicenseError

# Identifiers: https://huggingface.co/docs/hub/repositories-licenses. In Creative Commons' names `nd` is
# "no derivatives" (they may be made, but not shared) and `nc` is "no commercial use"; its links end
# on by-nc-nd/4.0.
NO_DERIVATIVES = re.compile(r"(?<![a-z])by(-nc|-sa)*-nd(?![a-z])|(?<![a-z])no-?deriv")
NOT_COMMERCIAL = re.compile(r"(?<![a-z])by(-nd|-sa)*-nc(?![a-z])|(?<![a-z])non-?commercial")
RESEARCH_ONLY = {"apple-amlr", "intel-research"}
UNTOLD = {"", "unknown", "none"}
OWN_TERMS = "other"


def _spelled(text: str) -> str:
    """A licence as the Hub spells it, with hyphens between words and dots in versions alone."""
    words = re.sub(r"([^\w.]|_|\.(?!\d)|(?<!\d)\.)+", "-", text.lower()).strip("-")
    return re.sub(r"cc-?by((?:-?(?:nc|nd|sa))*)", _apart, words)


def _apart(found: re.Match[str]) -> str:
    """The terms of Creative Commons with a hyphen before each: "ccbyncnd" is "cc-by-nc-nd"."""
    return "cc-by" + "".join(f"-{term}" for term in re.findall("nc|nd|sa", found[1]))


def _named(source: Source) -> list[str]:
    """The licences that the card names."""
    return [name for name in map(_spelled, source.licenses) if name not in UNTOLD]


def _all_terms(source: Source) -> Iterator[str]:
    """The licences, and what the card says of those that the Hub has no identifier for."""
    yield from _named(source)
    if source.license_name:
        yield _spelled(source.license_name)
    if source.license_link and "creativecommons.org/" in source.license_link:
        yield source.license_link.lower()


def _forbidding(source: Source) -> str | None:
    return next((terms for terms in _all_terms(source) if NO_DERIVATIVES.search(terms)), None)


def forbids_sharing(source: Source) -> bool:
    """Whether one of the licences forbids to share what is made from the model."""
    return _forbidding(source) is not None


def remark(source: Source) -> str | None:
    """What to know before publishing what is made from a model, in one line; None if there is nothing."""
    named, name = _named(source), source.repo_id or source.name
    forbidding = _forbidding(source)
    if forbidding:
        return f"the licence of {name}, {forbidding}, forbids to share what is made from it"
    own_terms = " ".join(filter(None, (source.license_name, source.license_link)))
    if not named and not own_terms:
        return f"{name} names no licence, so nothing allows to publish what is made from it; ask its owner"
    limits = [t for t in _all_terms(source) if t in RESEARCH_ONLY or NOT_COMMERCIAL.search(t)]
    if limits:
        return f"the licence of {name}, {limits[0]}, allows no commercial use, also of what is made from it"
    if OWN_TERMS in named or not named:
        terms = own_terms or "not named on its card"
        return f"{name} has terms of its own ({terms}); they hold for what is made from it: read them first"
    return None


def check_license(source: Source, *, accepted: bool) -> None:
    """Refuse to publish what a licence of the source forbids to share.

    Args:
        accepted: The user says that they may.

    Raises:
        LicenseError: A licence allows no derivatives.
    """
    if forbids_sharing(source) and not accepted:
        raise LicenseError(
            f"{remark(source)}", hint="with a permission from its owner, --accept-license publishes it"
        )
