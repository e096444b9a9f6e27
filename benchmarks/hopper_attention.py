"""Attention on one Hopper GPU against cuDNN's: prefill, decode steps against a copy of the cache too, and gradients.

    python benchmarks/hopper_attention.py [--suites prefill,decode,backward] [--out benchmarks/rows/hopper_attention.jsonl]

Heads are Qwen3-8B's. Each side has keys and values in the layout that it likes best; cuDNN decodes from the same cache, which
takes turns with others so that it comes from memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import hopper_timing
import jax
import jax.numpy as jnp
from hopper_model import Cudnn
from hopper_timing import Case, normal

from tbik_jax.bench import _ROTATION_BYTES
from tbik_jax.kernels.attention import hopper
from tbik_jax.kernels.attention.hopper.backward import attention_backward

Array = jax.Array

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
#: Batch and tokens of each sequence.
SEQUENCES = ((8, 2048), (2, 8192), (1, 2048), (1, 32768))
DECODED = tuple((batch, keys) for batch in (1, 16, 64) for keys in (4096, 32768))


def row(suite: str, batch: int, keys: int, **other: Any) -> dict[str, Any]:
    """What identifies a row."""
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    return {"suite": suite, "batch": batch, "keys": keys, **other, **heads}


def drawn(key: Array, batch: int, queries: int, keys: int) -> tuple[Array, Array, Array]:
    sizes = (batch, queries, HEADS, HEAD_DIM), *((batch, KV_HEADS, keys, HEAD_DIM),) * 2
    return normal(key, [jax.ShapeDtypeStruct(size, "bfloat16") for size in sizes])


def cudnn(q: Array, k: Array, v: Array) -> Array:
    """Causal; keys and values ``[B, S, heads, D]``."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=SCALE, implementation="cudnn")


def positions_of(batch: int, tokens: int) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))


def product_flop(batch: int, tokens: int) -> float:
    """Of one causal product."""
    return batch * HEADS * tokens**2 * HEAD_DIM


def prefill() -> list[Case]:
    def draw(key: Array, batch: int, tokens: int) -> tuple[Array, ...]:
        q, k, v = drawn(key, batch, tokens, tokens)
        return q, k, v, k.swapaxes(1, 2), v.swapaxes(1, 2), positions_of(batch, tokens)

    return [
        Case(
            row("prefill", batch, tokens),
            partial(draw, batch=batch, tokens=tokens),
            lambda q, k, v, kt, vt, positions: hopper.attention(SCALE, q, k, v, positions),
            lambda q, k, v, kt, vt, positions: cudnn(q, kt, vt),
            "cuDNN",
            flop=2 * product_flop(batch, tokens),
        )
        for batch, tokens in SEQUENCES
    ]


def decode() -> list[Case]:
    def draw(key: Array, batch: int, keys: int, copies: int) -> tuple[Any, ...]:
        each = [drawn(k, 1, 1, keys) for k in jax.random.split(key, copies)]
        q, *caches = (jnp.tile(x, (batch, 1, 1, 1)) for x in (each[0][0], *(x for _, *kv in each for x in kv)))
        return q, jnp.full((batch, 1), keys - 1, jnp.int32), list(zip(caches[::2], caches[1::2], strict=True))

    def in_turn(f: Any) -> Any:
        one = jax.jit(f)  # one kernel, however many caches
        return lambda q, positions, caches: [one(q, k, v, positions) for k, v in caches]

    found = []
    for batch, keys in DECODED:
        size = 2 * 2 * batch * KV_HEADS * keys * HEAD_DIM
        copies = 1 + int(_ROTATION_BYTES / size)
        found.append(
            Case(
                row("decode", batch, keys),
                partial(draw, batch=batch, keys=keys, copies=copies),
                in_turn(partial(hopper.attention, SCALE)),
                in_turn(lambda q, k, v, positions: Cudnn().attention(q, k, v, positions, SCALE, None)),
                "cuDNN",
                bytes=size,
                calls=copies,
            )
        )
    return found


def backward() -> list[Case]:
    def draw(key: Array, batch: int, tokens: int) -> tuple[Any, ...]:
        first, second = jax.random.split(key)
        q, k, v = drawn(first, batch, tokens, tokens)
        y, lse = hopper.attention_with_lse(SCALE, q, k, v, positions_of(batch, tokens))
        _, pull = jax.vjp(cudnn, q, k.swapaxes(1, 2), v.swapaxes(1, 2))
        return *normal(second, [y]), q, k, v, y, lse, jnp.zeros(batch, jnp.int32), pull

    def ours(dy, q, k, v, y, lse, offset, pull) -> Any:
        return attention_backward(dy, q, k, v, y, lse, offset=offset, scale=SCALE)

    return [
        Case(
            row("backward", batch, tokens),
            partial(draw, batch=batch, tokens=tokens),
            ours,
            lambda dy, *others: others[-1](dy),
            "cuDNN",
            flop=5 * product_flop(batch, tokens),
        )
        for batch, tokens in SEQUENCES
    ]


if __name__ == "__main__":
    suites = {"prefill": prefill, "decode": decode, "backward": backward}
    hopper_timing.main(__doc__, suites, "hopper_attention.jsonl")
