"""What `jsfdd evaluate` prints: a row a source and one for all, a table a draft."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


def print_evaluation(reports: dict[str, dict], differences: list[dict]) -> None:
    """Reports of `evaluate` and differences of `compare`, as text on stdout."""
    out = Console(highlight=False)
    for name, report in reports.items():
        out.print(_table(name, report))
        counts = "  ".join(f"{i}: {count}" for i, count in enumerate(report["accept_counts"]))
        out.print(f"steps by accepted draft tokens: {counts}")
        share = report["same_text_share"]
        same = "" if share is None else f"; {share:.0%} of the answers are plain decoding's"
        out.print(f"speed without compiling, which took {report['compile_seconds']:.0f} s for all programs{same}")
    for difference in differences:
        out.print(describe_difference(difference))


def describe_difference(difference: dict) -> str:
    """One line of `compare`: the paired difference of two τ, its interval, and what it says."""
    low, high = difference["low"], difference["high"]
    seen = "no difference seen" if low <= 0 <= high else "higher" if low > 0 else "lower"
    return (
        f"τ of {difference['a']} minus {difference['b']}: {difference['tau_difference']:+.3f} [{low:+.3f}, {high:+.3f}], {seen}"
    )


def _table(name: str, report: dict) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=name, title_justify="left")
    for column in ("source", "prompts", "τ [95%]", "macro τ", "l", "α by depth", "tokens/s", "plain", "speedup"):
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    rows = {**report["per_source"], "all": report} if len(report["per_source"]) > 1 else {"all": report}
    for source, row in rows.items():
        table.add_row(
            source,
            str(row["n_prompts"]),
            _interval(row, "tau", 3),
            _number(row["tau_macro"], 3),
            _number(row["l"], 3),
            " ".join(_number(alpha, 2) for alpha in row["alpha"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['baseline_tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}",
        )
    return table


def _interval(row: dict, name: str, digits: int) -> str:
    if row[name] is None:
        return "–"
    return f"{row[name]:.{digits}f} [{row[name + '_low']:.{digits}f}, {row[name + '_high']:.{digits}f}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
