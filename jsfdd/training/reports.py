"""What a run writes while it trains: the lines of its logs, its best draft and its checkpoints, each when it is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

from jsfdd.base.processes import is_primary
from jsfdd.base.progress import progress as show_progress
from jsfdd.base.records import Sample, TrainState
from jsfdd.training.figures import RecentSteps
from jsfdd.training.journal import Journal
from jsfdd.training.recipe import Recipe
from jsfdd.training.schedule import Step
from jsfdd.training.step import StepMetrics
from jsfdd.training.timings import Laps, Throughput
from jsfdd.weights.checkpoint import Checkpoints

Probe = Callable[[dict], dict]  # draft params -> figures, among them "tau"
HeldOut = Callable[[dict], dict[str, float]]  # draft params -> figures


class Watch(NamedTuple):
    """What a run looks at while it trains.

    Attributes:
      held_out: the figures at an epoch's end; None if nothing is held out.
      probe: decodes a few prompts every `probe_every` steps and after the last; None never does.
      patience: how many probes in a row without a new best τ end the run; None trains to the last step.
    """

    held_out: HeldOut | None = None
    probe: Probe | None = None
    probe_every: int = 200
    patience: int | None = None


class Reports:
    """The reports of one run, from the step at which it goes on. Use it in a `with`.

    Args:
      checkpoints, journal: of the run, open.
      samples, steps: of the whole run.
      start: how many steps were taken before.
      recipe: says how often lines and checkpoints are due.
      learning_rate: step -> the rate, from 0.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        journal: Journal,
        samples: Sequence[Sample],
        steps: Sequence[Step],
        start: int,
        recipe: Recipe,
        watch: Watch,
        learning_rate: Callable[[int], float],
        throughput: Throughput,
        progress: bool,
    ):
        self._checkpoints, self._journal, self._recipe, self._watch = checkpoints, journal, recipe, watch
        self._num_steps, self._learning_rate, self._throughput = len(steps), learning_rate, throughput
        self._recent, self._laps, self._stack = RecentSteps(samples), Laps(), ExitStack()
        self._recent.go_on(checkpoints.unreported, steps)
        self._bar = show_progress("train", "steps", len(steps), finished=start, shown=progress and is_primary())

    def __enter__(self) -> Reports:
        self._stack.enter_context(self._journal)
        self._bar = self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @property
    def out_of_patience(self) -> bool:
        """Whether τ has not risen for as many probes as the run waits."""
        return self._watch.patience is not None and self._journal.worse_probes >= self._watch.patience

    def reading(self) -> AbstractContextManager:
        """What is done inside is logged as the time of reading."""
        return self._laps.lap("reading")

    def after(self, step: Step, state: TrainState, metrics: StepMetrics) -> None:
        """Write what is due after a step. FloatingPointError: a loss or gradient since the last line is not finite."""
        self._recent.add(step, metrics)
        self._bar.update(step.number)
        last = step.number == self._num_steps
        probes = self._watch.probe is not None and (last or step.number % self._watch.probe_every == 0)
        saves = last or step.number % self._recipe.save_every == 0
        # A checkpoint ends a line too: figures that still await theirs are not part of it.
        if not (saves or probes or step.ends_epoch or step.number % self._recipe.log_every == 0):
            return
        steps = self._note_line(step)
        if step.ends_epoch and self._watch.held_out is not None:
            with self._laps.lap("held_out"):
                figures = self._watch.held_out(state.params)
            self._journal.note(_head(step) | {"held_out": figures})
        if probes:
            self._note_probe(step, state)
        lap = self._laps.since_last()
        self._journal.note_timing({"step": step.number, "steps": self._num_steps, **lap, **self._throughput.rates(steps, lap)})
        if saves or self.out_of_patience:
            self._journal.seal(step.number)
            self._checkpoints.save(state)

    def save_now(self, state: TrainState) -> None:
        """Save a state between two checkpoints, with the figures that await their line."""
        number = int(state.step)
        if number not in (0, self._checkpoints.latest_step):
            self._journal.seal(number)
            self._checkpoints.save(state, self._recent.to_json())

    def _note_line(self, step: Step) -> list[Step]:
        steps, figures = self._recent.take()
        self._bar.update(step.number, figures=f"loss {figures['loss']:.3f}")
        rate = float(self._learning_rate(step.number - 1))
        self._journal.note(_head(step) | figures | {"learning_rate": rate, "tokens": step.tokens})
        return steps

    def _note_probe(self, step: Step, state: TrainState) -> None:
        with self._laps.lap("probe"):
            figures = self._watch.probe(state.params)
        if figures["tau"] > self._journal.best_tau:
            self._checkpoints.save_best(state)
        self._journal.note(_head(step) | {"probe": figures})


def _head(step: Step) -> dict:
    return {"step": step.number, "epoch": step.epoch}
