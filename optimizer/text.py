"""Pure: how figures and foreign errors are worded."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, else the error's class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def size(count: float) -> str:
    """Bytes for people, in the units of a file manager (1 KB = 1000 bytes)."""
    if count < 1000:
        return f"{count:.0f} B"
    for limit, unit in ((1e6, "KB"), (1e9, "MB")):
        if count < limit:
            return f"{count / limit * 1e3:.1f} {unit}"
    return f"{count / 1e9:.1f} GB"


def milliseconds(value: float) -> str:
    """Milliseconds with three significant digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def share(value: float, *, points: bool) -> str:
    """A score: in percent where it is a share of samples, else as it is."""
    return f"{value * 100:.2f} %" if points else f"{value:.4g}"


def drop(value: float, *, points: bool) -> str:
    """A difference of scores: in percentage points where the score is a share of samples."""
    value = 0.0 if abs(value) < 1e-12 else value
    return f"{value * 100:.2f} pt" if points else f"{value:.4g}"


def join(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
