"""What `jsfdd evaluate` prints for each draft: speed and acceptance, a row a source and one for all."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


def print_evaluation(reports: dict[str, dict], differences: list[dict], out: Console) -> None:
    """Reports of `evaluate` and differences of `compare`, as text."""
    for name, report in reports.items():
        rows = {**report["per_source"], "all": report} if len(report["per_source"]) > 1 else {"all": report}
        out.print(_speed(name, rows))
        out.print(_acceptance(rows, len(report["alpha"])))
        if "drafts" in report:
            out.print(_shares(rows))
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


def _speed(name: str, rows: dict[str, dict]) -> Table:
    table = _table(name, "source", "prompts", "τ [95%]", "macro", "l", "tokens/s", "plain", "speedup")
    for source, row in rows.items():
        table.add_row(
            source,
            str(row["n_prompts"]),
            _interval(row, "tau", 3),
            _number(row["tau_macro"], 3),
            _number(row["l"], 3),
            f"{row['tokens_per_second']:.1f}",
            f"{row['baseline_tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}",
        )
    return table


def _acceptance(rows: dict[str, dict], depth: int) -> Table:
    """α at each depth, and the share of steps by how many draft tokens they accepted, from none to all."""
    table = _table(None, "source", *(f"α{i + 1}" for i in range(depth)), "steps by accepted draft tokens, 0 first")
    for source, row in rows.items():
        steps = max(row["n_steps"], 1)
        shares = " ".join(f"{count / steps:.0%}" for count in row["accept_counts"])
        table.add_row(source, *(_number(alpha, 2) for alpha in row["alpha"]), shares)
    return table


def _shares(rows: dict[str, dict]) -> Table:
    """What each of several drafts proposed of what was verified, and of what was accepted (`shares.py`)."""
    table = _table(None, "source", *(f"{name}: verified, accepted" for name in rows["all"]["drafts"]))
    for source, row in rows.items():
        drafts = row["drafts"].values()
        table.add_row(source, *(f"{_percent(own['verified_share'])}, {_percent(own['accepted_share'])}" for own in drafts))
    return table


def _table(title: str | None, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    return table


def _interval(row: dict, name: str, digits: int) -> str:
    if row[name] is None:
        return "–"
    return f"{row[name]:.{digits}f} [{row[name + '_low']:.{digits}f}, {row[name + '_high']:.{digits}f}]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
