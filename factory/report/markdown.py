"""Format the card's Markdown: escape untrusted text, and write numbers and names."""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from factory.artifacts import DataSource, Origin, layer_ranges
from factory.report.notes import gguf_note
from factory.report.summaries import describe_seam
from factory.units import count_in_words, rough_duration, size

HUB = "https://huggingface.co"
SMALLEST_P = 0.001  # smaller ones are shown as "<"
NO_BREAK = "\u00a0"


def filters() -> dict[str, Any]:
    """Return the filters of the card's template; those that return `Markup` do their own escaping."""
    return {
        "code": code,
        "count": count_in_words,
        "duration": rough_duration,
        "exact": lambda value: f"{value:,}",
        "gguf": gguf_note,
        "general": lambda value: f"{value:g}",
        "hub_url": lambda repo_id: Markup(f"{HUB}/{quote(plain(repo_id))}"),
        "layers": layer_ranges,
        "number": number,
        "origin": origin_name,
        "p_value": p_value,
        "percent": percent,
        "python": lambda text: Markup(json.dumps(plain(text), ensure_ascii=False)),
        "row": row,
        "seam": describe_seam,
        "signed": signed,
        "size": size,
        "rule": lambda cells: Markup("|---|" + "--:|" * (len(cells) - 1)),
        "text": text_name,
        "url": lambda text: Markup(quote(plain(text), safe=":/?=&%#~+,;@")),
    }


def plain(text: str) -> str:
    """Return text on one line, without control, format (such as right-to-left) and surrogate characters."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def clean(value: Any) -> Any:
    """Apply `plain` to every string of a nested value."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def markdown(text: str) -> Markup:
    """Escape text for prose and tables, so that nothing in it is Markdown, HTML or a link."""
    escaped = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", plain(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"://|(?<=www)\.", lambda match: "\\" + match[0], escaped, flags=re.IGNORECASE))


def code(text: str) -> Markup:
    """Return a code span, or escaped text if it has a backtick or bar, which are not safe in a span."""
    shown = plain(text)
    return markdown(shown) if "`" in shown or "|" in shown or not shown else Markup(f"`{shown}`")


def row(cells: Sequence[str]) -> Markup:
    """Return one row of a table, without line breaks between a number and its sign, or in brackets."""
    return Markup(f"| {' | '.join(_unbroken(markdown(cell)) for cell in cells)} |")


def _unbroken(cell: str) -> str:
    """Put no-break spaces around ±, before ×, and within an interval."""
    cell = re.sub(r" (?=[±×])|(?<=±) ", NO_BREAK, cell)
    return re.sub(r"\([+−]?[\d.]+ to [+−]?[\d.]+\)", lambda found: found[0].replace(" ", NO_BREAK), cell)


def number(value: float, *, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals; infinities as ∞, NaN as n/a."""
    if math.isnan(value):
        return "n/a"
    return f"{value:.{digits}f}" if math.isfinite(value) else "−∞" if value < 0 else "∞"


def signed(value: float, *, digits: int = 3) -> str:
    """Format a difference with its sign: "+0.391", "−0.012", "0.000"."""
    shown = number(abs(value), digits=digits)
    if math.isnan(value):
        return shown
    return shown if float(shown.replace("∞", "1")) == 0 else ("−" if value < 0 else "+") + shown


def p_value(value: float) -> str:
    """Format a p-value: "p = 0.041", "p < 0.001"."""
    return f"p = {value:.3f}" if value >= SMALLEST_P else f"p < {SMALLEST_P}"


def with_error(value: float, stderr: float | None) -> str:
    """Format a value with its standard error: "0.624 ± 0.004"."""
    return number(value) if stderr is None else f"{number(value)} ± {number(stderr)}"


def percent(share: float) -> str:
    """Format a share in percent: 0.785 → "79%"."""
    return f"{100 * share:.0f}%"


def signed_percent(share: float) -> str:
    """Format a relative change in percent: −0.265 → "−26%", 0.0 → "0%"."""
    return signed(100 * share, digits=0) + "%"


def origin_name(origin: Origin) -> Markup:
    """Return a link to a repository with its commit, or the name of a folder."""
    if origin.repo_id is None:
        return code(origin.name)
    link = f"[{markdown(origin.repo_id)}]({HUB}/{quote(plain(origin.repo_id))})"
    return Markup(f"{link} (commit {code(origin.commit[:12])})")


def text_name(data: DataSource) -> Markup:
    """Return the name of a text: a link for a Hub data set, a description for Python's own sources."""
    if data.mixed:
        parts = [f"{one.share:g} part{'s' * (one.share != 1)} of {text_name(one.data)}" for one in data.mixed]
        return Markup(f"a mix, by length, of {', '.join(parts[:-1])} and {parts[-1]}")
    split = f", {data.split} split" if data.split else ""
    if data.part:
        split += (
            f", {data.part}" if data.part.startswith("without") else f", part {data.part} of its documents"
        )
    if data.hub_id:
        link = f"{HUB}/datasets/{quote(plain(data.hub_id))}"
        return Markup(f"[{markdown(data.name)}]({link}){markdown(split)}")
    if data.name == "stdlib:prose":
        return Markup(f"the prose of Python's reference manual ({code(data.name)}{markdown(split)})")
    if data.name.startswith("stdlib:"):
        return Markup(f"the source code of Python's standard library ({code(data.name)}{markdown(split)})")
    return Markup(f"{markdown(data.name)}{markdown(split)}")


def ratio(after: float, before: float) -> str:
    """Format after / before: "0.73 ×"."""
    return f"{after / before:.2f} ×" if before else "n/a"


def rate(tokens_per_second: float, spread: float) -> str:
    """Format tokens per second with its relative spread: "2,210 ± 2%"."""
    digits = 0 if tokens_per_second >= 100 else 1
    return f"{tokens_per_second:,.{digits}f} ± {100 * spread:.0f}%"
