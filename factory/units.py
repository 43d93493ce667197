"""Format bytes, counts and durations as text."""


def size(num_bytes: int, *, decimals: int = 1) -> str:
    """Format bytes in powers of ten, as disks are sold: 14483464192 → "14.5 GB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.{decimals}f} {name}"
    return f"{num_bytes} bytes"


def count(number: int) -> str:
    """Format a count with a suffix: 1234567 → "1.23 M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def count_in_words(number: int) -> str:
    """Format a count in words: 7241732096 → "7.24 billion"."""
    for unit, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= 0.9995 * unit:  # a number that rounds up to the unit
            return f"{number / unit:.3g} {name}"
    return str(number)


def duration(seconds: float) -> str:
    """Format a duration: 200 → "3 min 20 s", 1800 → "30 min"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        parts = ((whole // 60, "min"), (whole % 60, "s"))
    else:
        parts = ((whole // 3600, "h"), (whole % 3600 // 60, "min"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def rough_duration(seconds: float) -> str:
    """Format a duration roughly: 200 → "3 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f}".removesuffix(".0") + " h"
