"""The stages between the products on one Hopper GPU, against XLA's own fusions of plain code, and against a copy.

    python benchmarks/hopper_stages.py [--out benchmarks/rows/hopper_stages.jsonl]

Sizes are Qwen3-8B's, 8192 and 64 tokens. Bytes are those of operands and results, and in a backward pass of what the
forward one keeps for it, each once; where they stay in the L2 cache from one run to the next (always, with 64 tokens) there
is only a time, as there they lie in a model too: the stage before has just written them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import hopper_timing
import jax
import jax.numpy as jnp
from hopper_timing import Case, normal

from tbik_jax import dense
from tbik_jax.contract import Contract
from tbik_jax.numerics import Numerics

TOKENS = (8192, 64)
HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4096, 12288, 32, 8, 128, 151936
#: Logits of more tokens than that would not be held at once.
_MOST_LOGITS = 1024
_EPS = 1e-6


def of(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


#: Numerics -> the function of one stage.
Stage = Callable[[Numerics], Callable[..., Any]]


def stages(tokens: int) -> list[tuple[str, Stage, tuple[jax.ShapeDtypeStruct, ...], int]]:
    """``(name, stage, its operands, by how many of them there are gradients)``.

    None for `rope`, whose backward pass is itself, and for `add`, which has nothing to compute.
    """
    x, wide = of(tokens, HIDDEN), of(tokens, MLP)
    q, k = of(tokens, HEADS, HEAD_DIM), of(tokens, KV_HEADS, HEAD_DIM)
    angles = (of(tokens, HEAD_DIM // 2, dtype="float32"),) * 2
    logits = of(min(tokens, _MOST_LOGITS), VOCABULARY, dtype="float32")
    vocabulary = dense.Vocabulary(VOCABULARY, Contract(), None)

    def norm(n: Numerics) -> Callable[..., Any]:
        return lambda x, scale: n.rms_norm(x, scale, _EPS)

    def add_norm(n: Numerics) -> Callable[..., Any]:
        return lambda x, scale, y: n.add_rms_norm(x, y, scale, _EPS)

    def norm_rope(n: Numerics) -> Callable[..., Any]:
        return lambda q, k, q_scale, k_scale, cos, sin: n.norm_rope(
            q, k, q_scale, k_scale, _EPS, cos, sin, None, (1, 1)
        )

    def log_sum_exp(n: Numerics) -> Callable[..., Any]:
        if n.kind == "plain":
            return partial(jax.nn.logsumexp, axis=-1)
        return lambda logits: dense.log_sum_exp(logits, vocabulary)

    def cross_entropy(n: Numerics) -> Callable[..., Any]:
        def loss(logits: jax.Array) -> jax.Array:
            labels = jnp.arange(len(logits)) * 97 % VOCABULARY
            if n.kind == "plain":
                own = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
                return jax.nn.logsumexp(logits, axis=-1) - own
            return dense.cross_entropy(logits, labels, vocabulary)

        return loss

    return [
        ("norm", norm, (x, of(HIDDEN)), 2),
        ("add + norm", add_norm, (x, of(HIDDEN), x), 2),
        ("norm", norm, (q, of(HEAD_DIM)), 2),
        ("norm + rope, q and k", norm_rope, (q, k, *(of(HEAD_DIM),) * 2, *angles), 4),
        ("rope", lambda n: n.rope, (q, *angles), 0),
        ("rope", lambda n: n.rope, (k, *angles), 0),
        ("add", lambda n: n.add, (x, x), 0),
        ("swiglu", lambda n: n.swiglu, (wide, wide), 2),
        ("log-sum-exp", log_sum_exp, (logits,), 1),
        ("cross-entropy", cross_entropy, (logits,), 1),
    ]


def forward_case(name: str, stage: Stage, operands: tuple[jax.ShapeDtypeStruct, ...]) -> Case:
    ours, plain = stage(Numerics.invariant()), stage(Numerics.plain())
    moved = [*operands, *jax.tree.leaves(jax.eval_shape(plain, *operands))]
    draw = partial(normal, operands=operands)
    return Case(row("forward", name, operands[0]), draw, ours, plain, baseline_is="XLA", bytes=size(moved))


def backward_case(name: str, stage: Stage, operands: tuple[jax.ShapeDtypeStruct, ...], by: int) -> Case:
    """Ours with what its forward pass has kept, as in training; XLA's in one program that recomputes what it likes."""
    ours, plain = stage(Numerics.invariant()), stage(Numerics.plain())
    if name == "add + norm":  # XLA's is told the sum, too
        norm = Numerics.plain().rms_norm
        plain = lambda total, scale, _: (total, norm(total, scale, _EPS))  # noqa: E731
    results = jax.eval_shape(ours, *operands)
    cotangents = jax.tree.leaves(results)

    def gradients(f: Callable[..., Any], values: Sequence[Any]) -> Any:
        y, pull = jax.vjp(lambda *first: f(*first, *values[by : len(operands)]), *values[:by])
        return pull(jax.tree.unflatten(jax.tree.structure(y), values[len(operands) :]))

    def draw(key: jax.Array) -> tuple[Any, ...]:
        values = normal(key, [*operands, *cotangents])
        _, pull = jax.vjp(lambda *first: ours(*first, *values[by : len(operands)]), *values[:by])
        return pull, values

    def with_pull(pull: Any, values: Sequence[Any]) -> Any:
        return pull(jax.tree.unflatten(jax.tree.structure(results), values[len(operands) :]))

    kept, values = jax.eval_shape(draw, jax.random.key(0))
    moved = [*jax.tree.leaves(kept), *cotangents, *jax.tree.leaves(jax.eval_shape(with_pull, kept, values))]
    return Case(
        row("backward", name, operands[0]),
        draw,
        with_pull,
        lambda pull, values: gradients(plain, values),
        baseline_is="XLA",
        bytes=size(moved),
    )


def row(suite: str, name: str, first: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """What identifies a row."""
    shape = list(first.shape)
    return {"suite": suite, "stage": name, "tokens": shape[0], "shape": shape, "dtype": str(first.dtype)}


def size(arrays: Sequence[Any]) -> int:
    """Bytes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def cases(suite: str) -> list[Case]:
    found = []
    for tokens in TOKENS:
        for name, stage, operands, by in stages(tokens):
            if suite == "forward":
                found.append(forward_case(name, stage, operands))
            elif by:
                found.append(backward_case(name, stage, operands, by))
    return found


if __name__ == "__main__":
    hopper_timing.main(
        __doc__, {suite: partial(cases, suite) for suite in ("forward", "backward")}, "hopper_stages.jsonl"
    )
