"""Markdown of the card: escaping what others named, and how numbers and texts are written."""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from factory.artifacts import DataSource, layer_ranges
from factory.units import count_in_words, rough_duration

HUB = "https://huggingface.co"
SMALLEST_P = 0.001  # that is written out
NO_BREAK = "\u00a0"


def filters() -> dict[str, Any]:
    """Filters of the card's template; those that return `Markup` escape on their own."""
    return {
        "code": code,
        "count": count_in_words,
        "duration": rough_duration,
        "exact": lambda value: f"{value:,}",
        "general": lambda value: f"{value:g}",
        "hub_url": lambda repo_id: Markup(f"{HUB}/{quote(plain(repo_id))}"),
        "layers": layer_ranges,
        "number": number,
        "p_value": p_value,
        "percent": percent,
        "python": lambda text: Markup(json.dumps(plain(text), ensure_ascii=False)),
        "row": row,
        "signed": signed,
        "rule": lambda cells: Markup("|---|" + "--:|" * (len(cells) - 1)),
        "text": text_name,
        "url": lambda text: Markup(quote(plain(text), safe=":/?=&%#~+,;@")),
    }


def plain(text: str) -> str:
    """Text on one line without control, format (such as right-to-left) and surrogate characters."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def clean(value: Any) -> Any:
    """`plain` on every string of a nested value."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def markdown(text: str) -> Markup:
    """Text that shows as it is, in prose and in tables: nothing in it is Markdown, HTML or a link."""
    escaped = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", plain(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"://|(?<=www)\.", lambda match: "\\" + match[0], escaped, flags=re.IGNORECASE))


def code(text: str) -> Markup:
    """A code span; with a backtick or a table's bar in it, escaped text, which no span can hold safely."""
    shown = plain(text)
    return markdown(shown) if "`" in shown or "|" in shown or not shown else Markup(f"`{shown}`")


def row(cells: Sequence[str]) -> Markup:
    """One row of a table; no line breaks at a sign that belongs to the number beside it, or in brackets."""
    return Markup(f"| {' | '.join(_unbroken(markdown(cell)) for cell in cells)} |")


def _unbroken(cell: str) -> str:
    """With no-break spaces around ±, before × and %, and between the ends of an interval."""
    cell = re.sub(r" (?=[±×%])|(?<=±) ", NO_BREAK, cell)
    return re.sub(r"\([+−]?[\d.]+ to [+−]?[\d.]+\)", lambda found: found[0].replace(" ", NO_BREAK), cell)


def number(value: float, *, digits: int = 3) -> str:
    """With a fixed number of decimals; past the float range it is infinite."""
    if math.isnan(value):
        return "n/a"
    return f"{value:.{digits}f}" if math.isfinite(value) else "−∞" if value < 0 else "∞"


def signed(value: float, *, digits: int = 3) -> str:
    """A difference, with its sign: "+0.391", "−0.012", "0.000"."""
    shown = number(abs(value), digits=digits)
    if math.isnan(value):
        return shown
    return shown if float(shown.replace("∞", "1")) == 0 else ("−" if value < 0 else "+") + shown


def p_value(value: float) -> str:
    """ "p = 0.041", "p < 0.001"."""
    return f"p = {value:.3f}" if value >= SMALLEST_P else f"p < {SMALLEST_P}"


def with_error(value: float, stderr: float | None) -> str:
    """0.624 ± 0.004."""
    return number(value) if stderr is None else f"{number(value)} ± {number(stderr)}"


def percent(share: float) -> str:
    """0.785 → "79 %"."""
    return f"{100 * share:.0f} %"


def text_name(data: DataSource) -> Markup:
    """A Hub data set as a link; Python's own sources with what they are."""
    split = f", {data.split} split" if data.split else ""
    if data.part:
        split += f", {data.part}" if data.part.startswith("without") else f", documents of part {data.part}"
    if data.hub_id:
        link = f"{HUB}/datasets/{quote(plain(data.hub_id))}"
        return Markup(f"[{markdown(data.name)}]({link}){markdown(split)}")
    if data.name.startswith("stdlib:"):
        return Markup(f"the source code of Python's standard library ({code(data.name)}{markdown(split)})")
    return Markup(f"{markdown(data.name)}{markdown(split)}")


def ratio(after: float, before: float) -> str:
    """After over before: "0.73 ×"."""
    return f"{after / before:.2f} ×" if before else "n/a"


def rate(tokens_per_second: float, spread: float) -> str:
    """Tokens a second with the spread as a share of it: "2,210 ± 2 %"."""
    digits = 0 if tokens_per_second >= 100 else 1
    return f"{tokens_per_second:,.{digits}f} ± {100 * spread:.0f} %"
