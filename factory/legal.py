"""Which of a model's files are licence texts, as their names and sizes tell."""

import re

MOST_BYTES = 1_000_000  # the longest licences have a tenth
_TEXT = r"\.(txt|md|rst|html?|pdf)"
_FAMILY = "(apache|mit|bsd|[al]?gpl|lesser|mpl|cc|llama|gemma)"
# "LICENSE", "MODEL_LICENSE", "Tongyi Qianwen LICENSE AGREEMENT.txt", "Terms-of-use.md", "COPYING.LESSER"
_LICENSE = r"licen[cs](e|es|ing)(agreement)?(?![a-z])"
_OTHER = r"(?<![a-z])(copying|copyrights?|notices?|terms|use[ _-]?policy)(?![a-z])"
_STEM = r"(\w|[ ,()+-]|\.(?=\d))*"  # no dot but of a version
_SECRET = r"(?![^/]*(?<![a-z])(keys?|tokens?|secrets?|passwords?)(?![a-z]))"  # "license_key" is no text
LICENSE_FOLDER = re.compile("licen[cs]es", re.IGNORECASE)
LEGAL = re.compile(
    rf"({LICENSE_FOLDER.pattern}/)?{_SECRET}{_STEM}({_LICENSE}|{_OTHER}){_STEM}({_TEXT}|\.{_FAMILY}[\d.v-]*)?"
    rf"|{LICENSE_FOLDER.pattern}/{_SECRET}({_STEM}{_TEXT}|{_FAMILY}(?![a-z]){_STEM})",
    re.IGNORECASE,
)


def is_legal(name: str, size_bytes: int) -> bool:
    """Whether a file, in the model's folder or its `licenses/`, is a licence text."""
    return bool(LEGAL.fullmatch(name)) and size_bytes <= MOST_BYTES
