"""The tables that `jsfdd evaluate` prints for each draft: speed and acceptance, with a row per source and one for all."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from jsfdd.base.numbers import NO_VALUE, decimals, interval, percent, signed
from jsfdd.evaluation.step_cost import step_cost_words


def print_evaluation(reports: dict[str, dict], differences: list[dict], out: Console) -> None:
    """Print the reports of `evaluate` and the differences of `compare`."""
    for name, report in reports.items():
        rows = {**report["per_source"], "all": report} if len(report["per_source"]) > 1 else {"all": report}
        out.print(_speed(name, rows))
        out.print(_acceptance(rows, len(report["alpha"])))
        if "drafts" in report:
            out.print(_shares(rows))
        share = report["same_text_share"]
        same = "" if share is None else f"; {percent(share)} of the answers are plain decoding's"
        out.print(f"compiling took {report['compile_seconds']:.0f} s for all programs and is not in the speeds{same}")
        if words := step_cost_words(report["tau"], report.get("cost_ratio"), report.get("memory_cost_ratio", 1.0)):
            out.print(words)
    for difference in differences:
        out.print(describe_difference(difference))


def describe_difference(difference: dict) -> str:
    """One line per difference of `compare`: the paired difference of two τ, its interval, and a verdict."""
    low, high = difference["low"], difference["high"]
    if low is None:
        return f"τ of {difference['a']} minus {difference['b']}: {NO_VALUE}, nothing was verified on the same prompts"
    verdict = "no difference seen" if low <= 0 <= high else "higher" if low > 0 else "lower"
    return (
        f"τ of {difference['a']} minus {difference['b']}: {signed(difference['tau_difference'], 3)} "
        f"[{signed(low, 3)}, {signed(high, 3)}], {verdict}"
    )


def _speed(name: str, rows: dict[str, dict]) -> Table:
    table = _table(name, "source", "prompts", "τ [95%]", "macro", "l", "tokens/s", "plain", "speedup")
    for source, row in rows.items():
        table.add_row(
            source,
            str(row["n_prompts"]),
            f"{decimals(row['tau'], 3)} {interval(row['tau_low'], row['tau_high'], 3)}".rstrip(),
            decimals(row["tau_macro"], 3),
            decimals(row["l"], 3),
            decimals(row["tokens_per_second"], 1),
            decimals(row["baseline_tokens_per_second"], 1),
            decimals(row["speedup"]),
        )
    return table


def _acceptance(rows: dict[str, dict], depth: int) -> Table:
    """α at each depth, and the share of steps by how many draft tokens they accepted, from none to all."""
    table = _table(None, "source", *(f"α{i + 1}" for i in range(depth)), "steps by accepted draft tokens, 0 first")
    for source, row in rows.items():
        steps = max(row["n_steps"], 1)
        shares = " ".join(f"{count / steps:.0%}" for count in row["accept_counts"])
        table.add_row(source, *map(decimals, row["alpha"]), shares)
    return table


def _shares(rows: dict[str, dict]) -> Table:
    """For drafts that decode together: each draft's shares of the verified and accepted tokens (`shares.py`)."""
    table = _table(None, "source", *(f"{name}: verified, accepted" for name in rows["all"]["drafts"]))
    for source, row in rows.items():
        drafts = row["drafts"].values()
        table.add_row(source, *(f"{percent(draft['verified_share'])}, {percent(draft['accepted_share'])}" for draft in drafts))
    return table


def _table(title: str | None, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    return table
