"""The compiled parts of training: one optimizer step, and the same figures without one for held-out samples.

    step = make_train_step(draft, optimizer, mesh, recipe)
    state, metrics = step(borrow(target.config, target.params), state, batch)

The batch's rows are split over the mesh. Every device sums the losses and gradients of its tokens, one all-reduce sums over the
devices, and the result is divided by the number of tokens at the end. So all tokens have equal weight, on any device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jsfdd.base.mesh import split_over_data, sum_over_devices
from jsfdd.base.records import DraftBatch, TrainState
from jsfdd.base.tuning import vocabulary_block
from jsfdd.models.draft import DraftConfig, init_draft
from jsfdd.training.loss import Borrowed, LossSums, loss_sums
from jsfdd.training.recipe import Recipe


class StepMetrics(NamedTuple):
    """What a training step reports."""

    sums: LossSums
    grad_norm: Float[Array, ""]  # before clipping


def learning_rate_schedule(recipe: Recipe, num_steps: int) -> Callable[[int], Float[Array, ""]]:
    """Linear warm-up over `warmup_share` of the run's steps, then linear decay to a tenth at its last step."""
    return functools.partial(_learning_rate, recipe.learning_rate, _warmup(recipe, num_steps), num_steps)


def _warmup(recipe: Recipe, num_steps: int) -> int:
    return round(recipe.warmup_share * num_steps)


def _learning_rate(peak: float, warmup, num_steps, step) -> Float[Array, ""]:
    """A linear rise to `peak` over `warmup` steps, then a linear fall to a tenth of it."""
    rise = peak * (step + 1) / (warmup + 1)
    fallen = jnp.clip((step - warmup) / jnp.maximum(num_steps - 1 - warmup, 1), 0.0, 1.0)
    return jnp.where(step < warmup, rise, peak * (1 - 0.9 * fallen))


class OptimizerState(NamedTuple):
    """Adam's moments, the steps taken, and the run's length, which the learning rate depends on."""

    moments: optax.OptState
    step: Int[Array, ""]
    warmup: Int[Array, ""]
    num_steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW(0.9, 0.95) without weight decay, after clipping the global norm: EAGLE's recipe.

    The run's length is in the state and not in the program: optimizers of one recipe are equal whatever their length, so the
    arms of a run share a compiled step.
    """

    recipe: Recipe
    num_steps: int = dataclasses.field(compare=False)

    def init(self, params: dict) -> OptimizerState:
        lengths = (0, _warmup(self.recipe, self.num_steps), self.num_steps)
        return OptimizerState(self._rule().init(params), *(jnp.asarray(x, jnp.int32) for x in lengths))

    def update(self, gradient: dict, state: OptimizerState, params: dict) -> tuple[dict, OptimizerState]:
        """(what to add to `params`, the new state). It must not read `self.num_steps`."""
        directions, moments = self._rule().update(gradient, state.moments, params)
        rate = _learning_rate(self.recipe.learning_rate, state.warmup, state.num_steps, state.step)
        return jax.tree.map(lambda x: -rate * x, directions), state._replace(moments=moments, step=state.step + 1)

    def _rule(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.recipe.max_grad_norm), optax.scale_by_adam(b1=0.9, b2=0.95))


def make_optimizer(recipe: Recipe, num_steps: int) -> Optimizer:
    """The optimizer of a run of `num_steps` steps."""
    return Optimizer(recipe, num_steps)


def init_state(
    draft: DraftConfig,
    optimizer: Optimizer,
    seed: int,
    head: Float[Array, "V D"] | None = None,
    params: dict | None = None,
) -> TrainState:
    """A fresh draft, its optimizer's state, step 0 and the key of the run's noise.

    Args:
      head: the target's. An EAGLE-3 draft's head begins as a copy of it, or at random if it is not given.
      params: those of another draft of this shape, from which training starts.
    """
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    if params is None:
        params = init_draft(draft, init_key, head)
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)  # a copy, because a step takes over its state's buffers
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), noise_key)


def state_shardings(draft: DraftConfig, optimizer: Optimizer, mesh: Mesh, shard_optimizer: bool) -> TrainState:
    """The sharding of each array of a state: whole on every device, or with Adam's moments split over the data shards."""
    shapes = jax.eval_shape(lambda: init_state(draft, optimizer, 0))
    places = jax.tree.map(lambda _: NamedSharding(mesh, P()), shapes)
    if shard_optimizer:
        places = places._replace(opt_state=jax.tree.map(lambda x: split_over_data(x.shape, mesh), shapes.opt_state))
    return places


@functools.lru_cache(maxsize=8)
def make_train_step(
    draft: DraftConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    recipe: Recipe,
    shard_optimizer: bool = False,
) -> Callable[[Borrowed, TrainState, DraftBatch], tuple[TrainState, StepMetrics]]:
    """The compiled `(borrowed, state, batch) -> (state, metrics)`; `borrowed` is from `loss.borrow`.

    It compiles once per batch shape, for runs of every length, and takes over `state`'s buffers: use the returned one. `state`
    lives where `state_shardings` says, with the same `shard_optimizer`: if True, each data shard updates its part of the draft
    and all gather the whole (ZeRO's first stage, arXiv 1910.02054 §5). The batch's rows must be a multiple of the data shards.
    """
    gradient, update, places = _parts(draft, optimizer, mesh, recipe, shard_optimizer)

    def train_step(borrowed: Borrowed, state: TrainState, batch: DraftBatch):
        return update(state, *gradient(borrowed, state, batch, 0))

    return jax.jit(train_step, donate_argnames=("state",), out_shardings=places)


@functools.lru_cache(maxsize=8)
def make_accumulating_step(
    draft: DraftConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    recipe: Recipe,
    shard_optimizer: bool = False,
) -> Callable[[Borrowed, TrainState, Sequence[DraftBatch]], tuple[TrainState, StepMetrics]]:
    """As `make_train_step`, but `(borrowed, state, batches) -> (state, metrics)`: one step on all batches' tokens.

    Up to `recipe.accumulate` batches, of any shapes. Their gradients' sums are added up on the devices and divided by
    all their tokens, so that it is the step of one large batch.
    """
    gradient, update, places = _parts(draft, optimizer, mesh, recipe, shard_optimizer)

    def add(borrowed: Borrowed, state: TrainState, batch: DraftBatch, number, so_far):
        return jax.tree.map(jnp.add, so_far, gradient(borrowed, state, batch, number))

    first, add = jax.jit(gradient), jax.jit(add, donate_argnames=("so_far",))
    update = jax.jit(update, donate_argnames=("state",), out_shardings=places)

    def train_step(borrowed: Borrowed, state: TrainState, batches: Sequence[DraftBatch]):
        so_far = first(borrowed, state, batches[0], 0)
        for number, batch in enumerate(batches[1:], 1):
            so_far = add(borrowed, state, batch, number, so_far)
        return update(state, *so_far)

    return train_step


def _parts(draft, optimizer, mesh, recipe, shard_optimizer):
    """Two functions, not compiled: a batch's summed gradient and sums, and the optimizer's step with them; and where the
    results of that step live."""
    loss = _loss(draft, mesh, recipe)
    whole = NamedSharding(mesh, P())

    def gradient_sums(params, batch, noise_keys):
        def total(draft_params):
            sums = loss(draft_params, params["borrowed"], batch, noise_keys)
            return sums.total, sums

        return jax.grad(total, has_aux=True)(params["draft"])

    over_devices = sum_over_devices(gradient_sums, mesh, num_sharded=2)

    def gradient(borrowed: Borrowed, state: TrainState, batch: DraftBatch, number):
        # One key per batch and row: the noise does not depend on how rows are spread over devices.
        rows = jnp.arange(batch.tokens.shape[0])
        key = jax.random.fold_in(state.key, state.step * recipe.accumulate + number)
        noise_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        return over_devices({"draft": state.params, "borrowed": borrowed}, batch, noise_keys)

    def update(state: TrainState, gradient, sums: LossSums):
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums.counted, 1.0), gradient)
        # Without this, moments in parts make the compiler cut the gradient before the norm and exchange that leaf by leaf.
        gradient = jax.lax.with_sharding_constraint(gradient, whole)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        new = state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state, step=state.step + 1)
        return new, StepMetrics(sums, optax.tree.norm(gradient))

    return gradient, update, (state_shardings(draft, optimizer, mesh, shard_optimizer), whole)


@functools.lru_cache(maxsize=8)
def make_evaluate_step(draft: DraftConfig, mesh: Mesh, recipe: Recipe) -> Callable[[Borrowed, dict, DraftBatch], LossSums]:
    """Compile `(borrowed, draft_params, batch) -> LossSums`, without noise or gradient."""
    loss = _loss(draft, mesh, recipe)

    def sums(params, batch):
        return loss(params["draft"], params["borrowed"], batch, None)

    over_devices = sum_over_devices(sums, mesh)

    def evaluate_step(borrowed: Borrowed, draft_params: dict, batch: DraftBatch):
        return over_devices({"draft": draft_params, "borrowed": borrowed}, batch)

    return jax.jit(evaluate_step)


def _loss(draft: DraftConfig, mesh: Mesh, recipe: Recipe):
    return functools.partial(loss_sums, draft=draft, recipe=recipe, block=vocabulary_block(mesh.devices.flat[0].platform))
