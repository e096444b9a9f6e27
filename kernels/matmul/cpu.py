"""XLA:CPU dots whose every element is the ascending fma chain of `spec`, for every M, N and K.

A plain dot is that chain only for some shapes (which, depends on M, N and K together, and on the processor). Measured
forms that always are, with chunks of K no longer than 256:

=========  ======================  ==============  ================================================================
form       weights                 rows M          why
=========  ======================  ==============  ================================================================
`panels`   ``[chunk, P, k, n]``    M < 64          k * n <= 32768 keeps XLA on its own emitter, which walks K in order
`full`     ``[chunk, k, N]``       M = 1, M >= 64  the library's gemm walks K in order if N is a multiple of 64
`rows`     ``[chunk, N, k]``       M >= 2          the same, for weights that were not packed
=========  ======================  ==============  ================================================================

Which form runs is performance-only. None of it is promised by XLA, so `self_test` compares all of them to `spec` before
the first use in a process, and fails closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tbik_jax.kernels.backend import SelfTestError
from tbik_jax.kernels.matmul import spec

Array = jax.Array

#: Longest chunk of K, numerics-bearing: inside every K blocking seen in XLA:CPU's gemms (288 on AVX2, over 512 on AVX-512).
K_STEP = 256
_LANES = 64
#: Elements ``k * n`` up to which XLA multiplies few rows itself.
PANEL_ELEMENTS = 32768
_LARGE_M = 64
_UNROLLED_CHUNKS = 4


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _k_chunks(k: int, k_step: int) -> tuple[int, int]:
    """Chunks of at least 2: XLA turns a dot over a single k into a plain product, -0 included, that the next add swallows.

    The zero that completes the chunk adds +0, which the chain of the specification, begun from +0, never feels.
    """
    count, size = spec.k_chunks(k, k_step)
    return count, max(2, size)


def _pad(x: Array, shape: tuple[int, ...]) -> Array:
    """Zeros behind every dimension up to ``shape``."""
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, want - have) for have, want in zip(x.shape, shape, strict=True)])


def panel_width(k: int, n: int) -> int:
    """Columns per panel: a multiple of 64 that the small-dot emitter takes; wide panels are faster, padding is not."""
    widths = range(_LANES, max(_LANES, min(PANEL_ELEMENTS // k, 512)) + 1, _LANES)
    return min(widths, key=lambda width: _round_up(n, width) * (width + 16) / width)


@partial(jax.tree_util.register_dataclass, data_fields=("panels", "full"), meta_fields=("n", "k"))
@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[leaves, n, k]`` in the layouts that the CPU reads fastest, widened to f32.

    ``panels [leaves * chunks, P, size, width]`` serves few rows, ``full [leaves * chunks, size, n']`` many. Widening is
    exact, so bf16 weights keep their values; they take the memory of f32, and twice that with ``full``.
    """

    panels: Array
    full: Array | None
    n: int
    k: int

    @property
    def leaves(self) -> int:
        return self.panels.shape[0] // spec.k_chunks(self.k, K_STEP)[0]


def pack(w: Array, k_step: int = K_STEP, *, full: bool = True) -> PackedWeight:
    """Lay out ``w [leaves, n, k]``; ``full=False`` saves its memory and makes products of 64 rows and more slower."""
    leaves, n, k = w.shape
    count, size = _k_chunks(k, k_step)
    width = panel_width(size, n)
    w = w.astype(jnp.float32)
    blocks = _pad(w, (leaves, _round_up(n, width), count * size))
    blocks = blocks.reshape(leaves, -1, width, count, size).transpose(0, 3, 1, 4, 2)
    panels = blocks.reshape(leaves * count, -1, size, width)
    return PackedWeight(panels, _full(w, count, size) if full else None, n, k)


def _full(w: Array, count: int, size: int) -> Array:
    leaves, n, _ = w.shape
    w = _pad(w, (leaves, _round_up(n, _LANES), count * size))
    return w.reshape(leaves, -1, count, size).transpose(0, 2, 3, 1).reshape(leaves * count, size, -1)


def _full_from_panels(panels: Array) -> Array:
    chunks, _, size, _ = panels.shape
    full = panels.transpose(0, 2, 1, 3).reshape(chunks, size, -1)
    return _pad(full, (chunks, size, _round_up(full.shape[-1], _LANES)))


def leaf_products(x: Array, w: Array | PackedWeight, k_step: int = K_STEP) -> Array:
    """``x [M, leaves, k]`` times ``w [leaves, n, k]``: ``out[l, m, n] = sum_k x[m, l, k] * w[l, n, k]``, f32."""
    m, leaves, k = x.shape
    n = w.n if isinstance(w, PackedWeight) else w.shape[1]
    count, size = _k_chunks(k, k_step)
    x = _pad(x.astype(jnp.float32), (m, leaves, count * size))
    # A dot of constants XLA evaluates itself while it compiles, in another order; a barrier is no constant.
    x = lax.optimization_barrier(x.reshape(m, leaves * count, size).transpose(1, 0, 2))
    if not isinstance(w, PackedWeight):
        partial_sums = _rows(x, w, count, size)
    elif m < _LARGE_M and not (m == 1 and w.full is not None):
        partial_sums = _panels(x, w.panels, count)
    else:
        partial_sums = _chunk_sum(x, _full_from_panels(w.panels) if w.full is None else w.full, count, contract=1)
    return partial_sums[:, :m, :n]


def _panels(x: Array, panels: Array, count: int) -> Array:
    chunks, p, size, _ = panels.shape
    m = x.shape[1]
    x = jnp.broadcast_to(x[:, None], (chunks, p, m, size))
    out = lax.dot_general(x, panels, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    total = _left_deep(out.reshape(-1, count, *out.shape[1:]))
    return total.transpose(0, 2, 1, 3).reshape(total.shape[0], m, -1)


def _rows(x: Array, w: Array, count: int, size: int) -> Array:
    # Behind a barrier: XLA folds a transpose that made the weight into the dot, which then takes a path with another order.
    w = lax.optimization_barrier(w)
    leaves, n, _ = w.shape
    w = _pad(w.astype(jnp.float32), (leaves, _round_up(n, _LANES), count * size))
    w = w.reshape(leaves, -1, count, size).transpose(0, 2, 1, 3).reshape(leaves * count, -1, size)
    if x.shape[1] == 1:  # a single row takes a matrix-vector path with another order
        x = _pad(x, (x.shape[0], 2, size))
    return _chunk_sum(x, w, count, contract=2)


def _left_deep(parts: Array) -> Array:
    """``parts [leaves, count, ...]`` summed over count in order."""
    total = parts[:, 0]
    for c in range(1, parts.shape[1]):
        total = total + parts[:, c]
    return total


def _chunk_sum(x: Array, w: Array, count: int, *, contract: int) -> Array:
    """Batched products of ``x [leaves * count, M, size]``, summed left-deep over the chunks of each leaf."""
    dimensions = (((2,), (contract,)), ((0,), (0,)))
    if count <= _UNROLLED_CHUNKS:
        out = lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)
        return _left_deep(out.reshape(-1, count, *out.shape[1:]))
    # Many chunks: one at a time, so that the partial sums do not take count times the memory of the result.
    by_chunk = [a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1) for a in (x, w)]

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x, w = chunk
        return total + lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32), None

    xs, ws = by_chunk
    total = lax.dot_general(xs[0], ws[0], dimensions, preferred_element_type=jnp.float32)
    return lax.scan(add, total, (xs[1:], ws[1:]))[0]


@cache
def self_test() -> None:
    """Compare every form to `spec` once per process.

    Raises:
        SelfTestError: naming each form, shape and the share of elements that differ.
    """
    wrong = []
    generator = np.random.default_rng(2511)
    for k, n, k_step in ((192, 192, 192), (520, 65, 256)):
        w = generator.standard_normal((1, n, k), np.float32)
        for m in (1, 2, 7, 63, 64, 65):
            x = generator.standard_normal((m, 1, k), np.float32)
            rows, columns = sorted({0, m - 1}), np.r_[0:3, n - 3 : n]
            want = spec.leaf_product(x[rows, 0], w[0][columns], k_step)
            for form in ("packed", "rows", "rows of a transpose"):
                stored = np.ascontiguousarray(w.swapaxes(1, 2)) if form == "rows of a transpose" else w
                got = np.asarray(_compiled(form, m, k, n, k_step)(x, stored))[0][np.ix_(rows, columns)]
                share = float((got.view(np.int32) != want.view(np.int32)).mean())
                if share:
                    wrong.append(f"{form}, M = {m}, K = {k}, N = {n}: {share:.0%} of the elements differ")
    if wrong:
        raise SelfTestError(
            "XLA:CPU does not compute dots as ascending fma chains here, so results would depend on the mesh:\n"
            + "\n".join(f"  - {line}" for line in wrong)
            + f"\njax {jax.__version__}; versions 0.10.2 to 0.12 are known to on x86-64 with AVX2 or AVX-512."
        )


def _compiled(form: str, m: int, k: int, n: int, k_step: int) -> jax.stages.Compiled:
    def product(x: Array, w: Array) -> Array:
        if form == "packed":
            return leaf_products(x, pack(w, k_step), k_step)
        return leaf_products(x, w.swapaxes(1, 2) if form == "rows of a transpose" else w, k_step)

    weight = (1, k, n) if form == "rows of a transpose" else (1, n, k)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((m, 1, k), weight)]
    # Compiled ahead of time: it then runs at once, also while a caller's program is being traced.
    return jax.jit(product).lower(*shapes).compile()
