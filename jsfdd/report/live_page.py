"""The page of a run that is still going: progress, curves, and seconds by stage."""

from __future__ import annotations

from jsfdd.base.numbers import decimals, duration
from jsfdd.report.live import Live
from jsfdd.report.pages import render_template
from jsfdd.report.panel import arm_style
from jsfdd.report.plots import curves


def render_live_page(live: Live) -> str:
    """The whole page; its script fetches /live every two seconds, and loads the report once the run is finished."""
    return render_template("live.html", live=live, content=render_live(live), finished_run=live.finished and live.is_run)


def render_live(live: Live) -> str:
    """The content of the page, as HTML."""
    begun = [training for training in live.trainings if training.step]
    panels = []
    if begun:
        dashed = {training.name: training.held_out_curve for training in begun if training.held_out_curve[0]}
        panels.append(curves("Loss", {training.name: training.curve for training in begun}, dashed=dashed))
    if probed := {training.name: training.tau_curve for training in begun if training.tau_curve[0]}:
        panels.append(curves("τ of the probe", probed))
    return render_template(
        "live_content.html",
        live=live,
        panels=panels,
        legend_entries=[(training.name, *arm_style(training.name)[::2]) for training in begun],
        duration=duration,
        decimals=decimals,
        stages=list(live.seconds.items()),
    )
