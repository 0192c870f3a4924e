"""How flat the target's next-token distributions are, and the other scores of a token.

With z the logits after token t, p = softmax(z) and x the token that follows:

    flatness  cos(p, uniform) = 1/(√V·‖p‖₂)      arXiv 2601.18902, Eq. 6
    entropy   −Σ p log p, nats
    top1      p₁, the largest probability
    margin    p₁ − p₂
    energy    −logsumexp(z)                      arXiv 2010.03759, temperature 1
    nll       −log p(x)

Flatness is a monotone function of an entropy: cos(p, uniform) = exp(H₂/2)/√V with H₂ = −log Σp², the Rényi entropy of
order 2. `effective_choices` undoes the √V, so that targets of different vocabularies can be compared.

`metrics.py` defines how token scores become a sample's score.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsfdd.base.records import TokenScores
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.counted import fold_counted
from jsfdd.models.target import head_logits
from jsfdd.scoring.fast_scores import fast_token_scores


def token_flatness(logits: Float[Array, "*shape V"]) -> Float[Array, "*shape"]:
    """cos(p, uniform) = 1/(√V·‖p‖₂) of p = softmax(logits): 1 if all tokens are equally likely, 1/√V if one is certain.

    Logits of any dtype are computed in float32. A logit of −inf is a token that cannot occur; it still counts in V. A row
    with a NaN or +inf, or without a finite logit, gives NaN.

    Args:
      logits: unnormalised log-probabilities.

    Returns:
      Float32 flatness in [1/√V, 1] (arXiv 2601.18902, Eq. 6).

    Example:
      >>> import jax.numpy as jnp
      >>> print(token_flatness(jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-9, 1e-9]]))))
      [1.         0.70710677]
    """
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    vocab = p.shape[-1]
    return jnp.clip(1 / (vocab**0.5 * jnp.linalg.norm(p, axis=-1)), vocab**-0.5, 1.0)  # rounding may overstep the bounds


def token_scores(logits: Float[Array, "*shape V"], next_tokens: Int[Array, "*shape"]) -> TokenScores:
    """All scores of the distributions softmax(logits), as the module's table defines them.

    Args:
      logits: unnormalised log-probabilities of two tokens or more; −inf, NaN and +inf as in `token_flatness`.
      next_tokens: the token that followed, for nll.

    Returns:
      Float32 scores, shaped like `next_tokens`.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = token_scores(jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.array(1))
      >>> print(scores.top1, scores.margin, scores.nll)
      0.5 0.25 1.3862944
    """
    z = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(z, axis=-1)
    p = jnp.exp(log_p)
    largest, second = jnp.moveaxis(jax.lax.top_k(p, 2)[0], -1, 0)
    return TokenScores(
        flatness=token_flatness(z),
        entropy=jnp.sum(jax.scipy.special.entr(p), axis=-1),
        top1=largest,
        margin=largest - second,
        energy=-jax.nn.logsumexp(z, axis=-1),
        nll=-jnp.take_along_axis(log_p, next_tokens[..., None], axis=-1)[..., 0],
    )


def effective_choices(flatness: Float[Array, "*shape"], vocab_size: int) -> Float[Array, "*shape"]:
    """exp(H₂) = V·flatness², in [1, V]: the number of equally likely tokens that would be as flat. Takes any array type.

    Example:
      >>> effective_choices(0.5, 16)
      4.0
    """
    return vocab_size * flatness**2


def score_hidden(
    config: DecoderConfig,
    params: dict,
    hidden: Float[Array, "B T D"],
    next_tokens: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    block: int,
) -> TokenScores:
    """Score the target's distributions at the counted tokens, float32[B, T]; other tokens get 0.

    The head runs only on counted tokens, `block` at a time, so memory is block·V and does not depend on B·T.

    Args:
      config, params: the target; only its head is used.
      hidden: the target's hidden states after the final norm.
      next_tokens: the token after each position.
      counted: where the score counts (the index rule of `records.py`).
      block: tokens per head call.
    """
    hidden_rows, next_rows = hidden.reshape(-1, hidden.shape[-1]), next_tokens.reshape(-1)

    def visit(rows: Int[Array, " block"], scores: Float[Array, "R scores"]) -> Float[Array, "R scores"]:
        # Padding rows of the last block read zeros; their scores are dropped.
        logits = head_logits(config, params, hidden_rows.at[rows].get(mode="fill", fill_value=0))
        visited = fast_token_scores(logits, next_rows.at[rows].get(mode="fill", fill_value=0))
        return scores.at[rows].set(jnp.stack(visited, axis=-1), mode="drop")

    zeros = jnp.zeros((next_rows.shape[0], len(TokenScores._fields)), jnp.float32)
    scores = fold_counted(counted.reshape(-1), block, visit, zeros)
    return TokenScores(*[scores[:, i].reshape(counted.shape) for i in range(scores.shape[1])])
