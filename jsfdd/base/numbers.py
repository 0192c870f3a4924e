"""Numbers formatted for reports, tables and sentences."""

from __future__ import annotations

import math

NO_VALUE = "–"  # shown for a figure that does not exist


def decimals(x: float | None, digits: int = 2) -> str:
    """1,234.50, with a true minus sign; a dash for None and NaN."""
    if x is None or math.isnan(x):
        return NO_VALUE
    return f"{x:,.{digits}f}".replace("-", "−")


def signed(x: float, digits: int = 2) -> str:
    """+0.12 or −0.12; 0.00 has no sign."""
    text = f"{x:+,.{digits}f}".replace("-", "−")
    return text if any(digit in text for digit in "123456789") else text[1:]


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """[0.12, 0.34]; empty if a bound is None."""
    return "" if low is None or high is None else f"[{decimals(low, digits)}, {decimals(high, digits)}]"


def whole(x: float) -> str:
    """1,234."""
    return f"{x:,.0f}"


def gigabytes(size: float) -> str:
    """Bytes in GB, three significant digits."""
    return f"{size / 1e9:.3g}" if size >= 1e6 or not size else "<0.001"


def percent(x: float | None) -> str:
    """A share in [0, 1] as 12%; below 10% with one decimal unless it is 0 (3.4%, 5%)."""
    if x is None or math.isnan(x):
        return NO_VALUE
    text = f"{100 * x:.1f}" if abs(x) < 0.0995 else f"{100 * x:.0f}"
    return text.removesuffix(".0").replace("-", "−") + "%"


def significant(x: float | None) -> str:
    """Three significant digits, for flatness, which spans several powers of ten."""
    return NO_VALUE if x is None else f"{x:.3g}"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s or 2 h 05 min."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
