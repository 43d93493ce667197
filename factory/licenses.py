"""What the licence of a model says about publishing what is made from it, as far as its identifier tells."""

import re

from factory.artifacts import Source
from factory.errors import LicenseError

# Identifiers: https://huggingface.co/docs/hub/repositories-licenses. In Creative Commons' names `nd` is
# "no derivatives" (they may be made, but not shared) and `nc` is "no commercial use".
CREATIVE_COMMONS = re.compile(r"cc-by(?P<nc>-nc)?(?:-sa|(?P<nd>-nd))?(?:-?[\d.]+)?(?:-[a-z]+)?")
RESEARCH_ONLY = {"apple-amlr", "fair-noncommercial-research-license", "intel-research"}
UNTOLD = {"", "unknown"}
OWN_TERMS = "other"


def _identifier(source: Source) -> str:
    """The licence as the Hub spells it; where that is "other", a name that is one of Creative Commons'."""
    spelled, name = (
        "-".join((text or "").lower().replace("_", " ").replace("-", " ").split())
        for text in (source.license, source.license_name)
    )
    return name if spelled == OWN_TERMS and CREATIVE_COMMONS.fullmatch(name) else spelled


def forbids_sharing(source: Source) -> bool:
    """Whether the licence forbids to share what is made from the model."""
    match = CREATIVE_COMMONS.fullmatch(_identifier(source))
    return bool(match and match["nd"])


def remark(source: Source) -> str | None:
    """What to know before publishing what is made from a model, in one line; None if there is nothing."""
    license_id, name = _identifier(source), source.repo_id or source.name
    match = CREATIVE_COMMONS.fullmatch(license_id)
    if forbids_sharing(source):
        return f"the licence of {name}, {license_id}, forbids to share what is made from it"
    if license_id in UNTOLD:
        return f"{name} names no licence, so nothing allows to publish what is made from it; ask its owner"
    if license_id == OWN_TERMS:
        terms = " ".join(filter(None, (source.license_name, source.license_link))) or "not named on its card"
        return f"{name} has terms of its own ({terms}); they hold for what is made from it: read them first"
    if license_id in RESEARCH_ONLY or (match and match["nc"]):
        return f"the licence of {name}, {license_id}, allows no commercial use, also of what is made from it"
    return None


def check_license(source: Source, *, accepted: bool) -> None:
    """Refuse to publish what the source's licence forbids to share.

    Args:
        accepted: The user says that they may.

    Raises:
        LicenseError: The licence allows no derivatives.
    """
    if forbids_sharing(source) and not accepted:
        raise LicenseError(
            f"{remark(source)}", hint="with a permission from its owner, --accept-license publishes it"
        )
