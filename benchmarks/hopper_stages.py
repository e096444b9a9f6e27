"""The stages between the products on one Hopper GPU, against XLA's own fusions of plain code, and against a copy.

    python benchmarks/hopper_stages.py [--out benchmarks/rows/hopper_stages.jsonl]

Sizes are Qwen3-8B's, 8192 and 64 tokens. A backward pass computes what it needs of the forward one. Bytes are those of operands
and results, each once; where they stay in the L2 cache from one run to the next (always, with 64 tokens) there is only a
time, as there they lie in a model too: the stage before has just written them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import hopper_timing
import jax
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
        return lambda x, scale, cos, sin: n.norm_rope(x, scale, _EPS, cos, sin)

    def log_sum_exp(n: Numerics) -> Callable[..., Any]:
        if n.kind == "plain":
            return partial(jax.nn.logsumexp, axis=-1)
        return lambda logits: dense.log_sum_exp(logits, vocabulary)

    return [
        ("norm", norm, (x, of(HIDDEN)), 2),
        ("add + norm", add_norm, (x, of(HIDDEN), x), 2),
        ("norm", norm, (q, of(HEAD_DIM)), 2),
        ("norm + rope", norm_rope, (q, of(HEAD_DIM), *angles), 2),
        ("rope", lambda n: n.rope, (q, *angles), 0),
        ("rope", lambda n: n.rope, (k, *angles), 0),
        ("add", lambda n: n.add, (x, x), 0),
        ("swiglu", lambda n: n.swiglu, (wide, wide), 2),
        ("log-sum-exp", log_sum_exp, (logits,), 1),
    ]


def backward(f: Callable[..., Any], operands: int, by: int) -> Callable[..., Any]:
    """The gradients by the first operands; cotangents come behind all of them."""

    def run(*values: Any) -> Any:
        y, pull = jax.vjp(lambda *first: f(*first, *values[by:operands]), *values[:by])
        return pull(jax.tree.unflatten(jax.tree.structure(y), values[operands:]))

    return run


def cases(suite: str) -> list[Case]:
    ours, plain = Numerics.invariant(), Numerics.plain()
    found = []
    for tokens in TOKENS:
        for name, stage, operands, by in stages(tokens):
            programs = [stage(ours), stage(plain)]
            shape = operands[0].shape
            if suite == "backward":
                if not by:
                    continue
                cotangents = jax.tree.leaves(jax.eval_shape(programs[1], *operands))
                programs = [backward(f, len(operands), by) for f in programs]
                operands = (*operands, *cotangents)
            moved = [*operands, *jax.tree.leaves(jax.eval_shape(programs[1], *operands))]
            found.append(
                Case(
                    {
                        "suite": suite,
                        "stage": name,
                        "tokens": shape[0],
                        "shape": list(shape),
                        "dtype": str(operands[0].dtype),
                    },
                    partial(normal, operands=operands),
                    *programs,
                    baseline_is="XLA",
                    bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
                )
            )
    return found


if __name__ == "__main__":
    hopper_timing.main(
        __doc__, {suite: partial(cases, suite) for suite in ("forward", "backward")}, "hopper_stages.jsonl"
    )
