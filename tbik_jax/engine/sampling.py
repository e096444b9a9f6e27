"""From logits to a token: greedy, or noise that is keyed by (seed, position, vocabulary index) alone."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32

from tbik_jax._problems import Problems
from tbik_jax.kernels.elementary import exp, log
from tbik_jax.kernels.exact import product, quotient, tree_sum

Array = jax.Array

_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    ``temperature`` 0 is greedy: the largest logit, the smaller index among equals. Otherwise a token is drawn from
    ``softmax(logits / temperature)``, cut to the ``top_k`` largest (0: all) and then to the smallest set of tokens whose
    probabilities reach ``top_p``. Tokens that equal the last one kept are kept, too.

    Guarantee: a token depends on its logits, these settings, the request's seed and its position. No request sees another.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        with Problems("Sampling") as problems:
            problems.check(
                self.temperature == 0.0 or _COLDEST <= self.temperature < float("inf"),
                f"temperature = {self.temperature} is neither 0 (greedy) nor a number from {_COLDEST} on, below which "
                "logits would overflow",
            )
            problems.check(
                isinstance(self.top_k, int) and self.top_k >= 0,
                f"top_k = {self.top_k!r} is not an integer >= 0; 0 keeps all tokens",
            )
            problems.check(0.0 < self.top_p <= 1.0, f"top_p = {self.top_p} is outside (0, 1]")


def sample(logits: Array, seeds: Array, positions: Array, sampling: Sampling) -> Array:
    """``logits [B, V]`` f32, ``seeds [B]`` uint32, ``positions [B]`` of the token to come -> ``[B]`` int32.

    A draw is ``argmax(logits / temperature + gumbel)``; the noise of index v is threefry's, keyed by seed and position.
    """
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The quotient of `exact`, its reciprocal taken here: of a constant, XLA:GPU may or may not take it while it compiles.
    scaled = product(logits, float(np.float32(1) / np.float32(sampling.temperature)))
    if 0 < sampling.top_k < logits.shape[-1]:
        least = lax.top_k(scaled, sampling.top_k)[0][:, -1:]
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    if sampling.top_p < 1.0:
        scaled = _nucleus(scaled, sampling.top_p)
    return jnp.argmax(scaled + _gumbel(logits.shape[-1], seeds, positions), axis=-1).astype(jnp.int32)


def _gumbel(size: int, seeds: Array, positions: Array) -> Array:
    # The bare hash: how ``jax.random`` counts the elements of an array is a global flag's choice.
    index = jnp.arange(size, dtype=jnp.uint32)
    counts = jnp.concatenate([index, jnp.zeros_like(index)])  # the hash takes pairs: a first half, a second half

    def one(seed: Array, position: Array) -> Array:
        return threefry_2x32((seed, position.astype(jnp.uint32)), counts)[:size]

    # 23 random bits and a half are exact in f32: never 0, and never 1, whose noise would be infinite.
    uniform = ((jax.vmap(one)(seeds, positions) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -log(-log(uniform))


def _nucleus(scaled: Array, top_p: float) -> Array:
    """-inf outside the most probable tokens; a token stays if those before it have less than ``top_p`` together."""
    ordered = lax.sort(scaled, dimension=-1)[:, ::-1]
    weights = exp(ordered - ordered[:, :1])
    p = quotient(weights, jnp.broadcast_to(tree_sum(weights, keepdims=True), weights.shape))
    before = _prefix_sum(p) - p
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(kept - 1, 0), axis=-1)
    return jnp.where(scaled >= least, scaled, -jnp.inf)


def _prefix_sum(x: Array) -> Array:
    """Inclusive, by doubling shifts: additions only, in an order that the length alone decides."""
    shift = 1
    while shift < x.shape[-1]:
        x = x + jnp.pad(x[:, :-shift], ((0, 0), (shift, 0)))
        shift *= 2
    return x
