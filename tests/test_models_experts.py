"""A mixture of experts against its equations, token by token and expert by expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_config

from jsfdd.base.mesh import make_mesh
from jsfdd.commands.costs import param_bytes
from jsfdd.models.architecture import Experts
from jsfdd.models.draft import draft_config
from jsfdd.models.experts import ExpertsMLP
from jsfdd.models.flops import idle_entries, layer_matrices
from jsfdd.models.sharding import place_params
from jsfdd.models.target import hidden_states, init_params

EXPERTS = Experts(count=6, chosen=3, intermediate_size=8, normalised=True)


def slow_twin(params, x, experts):
    """The equations of the module in float64."""
    kernels = {name: np.asarray(part["kernel"], np.float64) for name, part in params.items()}
    out = np.zeros(x.shape)
    for t, token in enumerate(np.asarray(x, np.float64)):
        logits = token @ kernels["router"]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        chosen = sorted(range(experts.count), key=lambda e: -p[e])[: experts.chosen]
        total = sum(p[e] for e in chosen) if experts.normalised else 1.0
        for e in chosen:
            gate, up = token @ kernels["gate_experts"][e], token @ kernels["up_experts"][e]
            out[t] += p[e] / total * (gate / (1 + np.exp(-gate)) * up) @ kernels["down_experts"][e]
    return out


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("chosen", [1, 3, 6])
def test_sorted_tokens_give_what_one_token_at_a_time_gives(normalised, chosen):
    """Experts that no token chose included, of which a skewed router has some."""
    experts = Experts(count=6, chosen=chosen, intermediate_size=8, normalised=normalised)
    module, x = ExpertsMLP(toy_config(experts=experts)), jax.random.normal(jax.random.key(1), (2, 7, 32))
    params = module.init(jax.random.key(0), x)["params"]
    params["router"]["kernel"] = params["router"]["kernel"].at[:, 4].add(-0.5 * jnp.sign(x[0, 0])) * 3
    got = jax.jit(module.apply)({"params": params}, x)
    expected = slow_twin(params, x.reshape(-1, 32), experts).reshape(x.shape)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.slow
def test_a_target_split_over_devices_gives_the_same():
    config = toy_config(experts=EXPERTS)
    params, tokens = init_params(config, jax.random.key(0)), np.arange(24).reshape(2, 12)
    whole, split = (
        jax.jit(lambda p: hidden_states(config, p, tokens))(placed)
        for placed in (params, place_params(params, make_mesh(1, 2)))
    )
    np.testing.assert_allclose(split, whole, atol=2e-6)


def test_bfloat16_stays_bfloat16():
    module, x = ExpertsMLP(toy_config(experts=EXPERTS)), jnp.ones((1, 3, 32), jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), module.init(jax.random.key(0), x)["params"])
    assert module.apply({"params": params}, x).dtype == jnp.bfloat16


def test_entries_that_a_token_meets_and_does_not():
    """All matrices of the layers are those that a token meets and those of experts that it does not."""
    config = toy_config(experts=EXPERTS)
    outside = toy_config(experts=EXPERTS, num_layers=1)
    layer = param_bytes(config, 2, 1) - param_bytes(outside, 2, 1)  # of bfloat16 but for two norms of 32 in float32
    assert layer == 2 * (layer_matrices(config) + idle_entries(outside)) + 2 * 32 * 4
    assert idle_entries(toy_config()) == 0
    assert idle_entries(config) == 2 * 3 * 3 * 32 * 8


def test_more_experts_for_a_token_than_there_are():
    with pytest.raises(ValueError, match="num_experts_per_tok=7 is more than num_experts=6"):
        Experts(count=6, chosen=7, intermediate_size=8, normalised=True)


def test_the_draft_of_a_mixture_is_none():
    assert draft_config(toy_config(experts=EXPERTS)).decoder.experts is None
