"""Causal attention of whole sequences by JAX's kernel for TPUs (splash attention), in the form of `blocked_attention`.

    y, lse = splash_attention(q, k, v, scale, reach, with_lse=True)     # the equation is attention.quadratic_attention

The kernel keeps a block of queries in a core's memory while their keys come by, so that no logit is ever written out. It skips
the blocks in which no query sees a key. Which blocks those are must be known when it is compiled: `has_kernel` says whether it
can be used, and `attention.sequence_attention` asks. Tests run the kernel on a CPU, interpreted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsfdd.models.blocked_attention import Reach, blocked_gradient

LANES = 128  # positions of the smallest block
BLOCK = 512  # the most positions of a block: of larger ones a core's memory holds too few
LONGEST = 1 << 15  # JAX looks at every pair of positions to see which blocks to skip: 7 s at this length, minutes at 128k
FETCHED = 2  # blocks of keys that are fetched together where a sequence has enough


def has_kernel(length: int, reach: Reach) -> bool:
    """Whether this code is compiled for one TPU at a time, and sequences of `length` for a reach that the kernel knows.

    Inside `jax.shard_map` a mesh says what its devices are; a kernel cannot be split by the compiler, so that all axes must
    have been mapped over. Elsewhere nothing says what devices there will be.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None or device.platform != "tpu" or set(mesh.manual_axes) != set(mesh.axis_names):
        return False
    return LANES < length <= LONGEST and (reach.window is None or isinstance(reach.window, int) and reach.behind == 0)


def splash_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K H T"],
    v: Float[Array, "B K T H"],
    scale: float,
    reach: Reach,
    with_lse: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"] | None]:
    """`blocked_attention` by the kernel.

    Args:
      reach: one that `has_kernel` accepts.
      with_lse: otherwise the log-sum-exp is None, and not written: the kernel takes 128 numbers for each. With it the backward
        pass is that of `blocked_attention`, since the kernel's takes no slope by the log-sum-exp.
      interpret: run the kernel on a CPU, slowly.
    """
    if with_lse:
        return _with_lse(q, k, v, scale, reach, interpret)
    return _attend(q, k, v, scale, reach, False, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _with_lse(q, k, v, scale, reach, interpret):
    return _attend(q, k, v, scale, reach, True, interpret)


def _forward(q, k, v, scale, reach, interpret):
    y, lse = _attend(q, k, v, scale, reach, True, interpret)
    return (y, lse), (q, k, v, y, lse)


def _backward(scale, reach, interpret, kept, slopes):
    q, k, v, *results = kept
    return blocked_gradient(q, k, v, scale, reach, results, slopes)


_with_lse.defvjp(_forward, _backward)


def _attend(q, k, v, scale, reach: Reach, with_lse, interpret):
    length, group = q.shape[1], q.shape[3]
    block = BLOCK if length > BLOCK else -(-length // LANES) * LANES
    at_end = -length % block
    q = jnp.pad(q * jnp.asarray(scale, q.dtype), ((0, 0), (0, at_end), (0, 0), (0, 0), (0, 0))).transpose(0, 2, 3, 1, 4)
    k = jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, at_end))).swapaxes(2, 3)  # in memory it stays as it is: `SEQ_MINOR`
    v = jnp.pad(v, ((0, 0), (0, 0), (0, at_end), (0, 0)))
    kernel = _kernel(length + at_end, block, group, reach, with_lse, interpret)
    out = jax.vmap(jax.vmap(kernel))(q, k, v)
    y, lse = (out[0], out[1][0]) if with_lse else (out, None)
    y = y.transpose(0, 3, 1, 2, 4)[:, :length]
    lse = lse if lse is None else lse.transpose(0, 3, 1, 2)[:, :length]
    if not reach.behind:
        return y, lse
    # For a query that sees no key the kernel returns a mean of the values that it has met.
    sees_key = (jnp.arange(length) >= reach.behind)[None, :, None, None]
    return jnp.where(sees_key[..., None], y, 0), lse if lse is None else jnp.where(sees_key, lse, -jnp.inf)


def _kernel(length, block, group, reach: Reach, with_lse, interpret):
    """Attention of `group` heads of queries [G, T, H] that share keys and values [T, H]."""
    # The first import of Pallas takes long, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if reach.window is None:
        mask = masks.CausalMask((length, length), offset=-reach.behind)
    else:
        mask = masks.LocalMask((length, length), window_size=(reach.window - 1, 0), offset=0)
    fetched = FETCHED * block if length % (FETCHED * block) == 0 else block
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=fetched, block_kv_compute=block, k_layout=kernels.QKVLayout.SEQ_MINOR, block_q_dq=block,
        block_kv_dq=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
    )  # fmt: skip
    return kernels.make_splash_mqa(
        masks.MultiHeadMask([mask] * group), block_sizes=sizes, head_shards=1, q_seq_shards=1, save_residuals=with_lse,
        interpret=interpret,
    )  # fmt: skip
