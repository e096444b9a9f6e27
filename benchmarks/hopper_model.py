"""A Qwen3-8B-shaped model with random weights on one GPU: invariant numerics against plain ones, in one process.

    python benchmarks/hopper_model.py [--layers 36] [--out benchmarks/rows/hopper_model.jsonl]

Work: a prefill of 8192 tokens (logits of the last), and decode steps at batch 1, 16 and 64 with 4096 tokens of context.
The plain model is what JAX's users have: ordinary dots (cuBLAS), cuDNN attention, XLA's own fusions. A row holds the median
of several groups of steps that were enqueued together, by the wall clock, and what the kernels took by name.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbik_jax.bench import _commit
from tbik_jax.contract import Contract
from tbik_jax.engine import Generator, Sampling, make_mesh
from tbik_jax.models.drawn import QWEN3_8B, draw
from tbik_jax.numerics import Numerics, Plain

CONTEXT, PROMPT = 4096, 8192


class Cudnn(Plain):
    """Plain numerics with cuDNN's attention.

    Through the function behind ``jax.nn.dot_product_attention``, since that one takes ``[B, S, heads, D]`` alone, and would
    have XLA copy the cache at every step.
    """

    def attention(self, q, k, v, positions, scale, kv_head_of):
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        assert kv_head_of is None
        one = q.shape[1] == 1
        lengths = positions[:, -1] + 1
        y = cudnn.dot_product_attention(
            q.swapaxes(1, 2),
            k,
            v,
            scale=scale,
            qkv_layout="BNTH",
            mask_type=cudnn.MaskType.PADDING if one else cudnn.MaskType.CAUSAL,
            **({"q_seqlen": jnp.ones_like(lengths), "kv_seqlen": lengths} if one else {}),
        )
        return (y[0] if isinstance(y, tuple) else y).swapaxes(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=QWEN3_8B.num_layers)
    parser.add_argument("--sides", default="plain,chain,balanced")
    parser.add_argument("--work", default="prefill,decode 1,decode 16,decode 64")
    parser.add_argument("--groups", type=int, default=25)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--unpacked", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="also print the kernels of every work, by time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    numerics = {
        "plain": Cudnn(),
        "chain": Numerics.invariant(Contract(tree=(8,))),
        "balanced": Numerics.invariant(Contract(tree=(2,))),
    }
    config, mesh = dataclasses.replace(QWEN3_8B, num_layers=options.layers), make_mesh()
    found: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for side in options.sides.split(","):
        start = time.perf_counter()
        generator = Generator(draw(config, numerics[side], mesh), mesh, pack=not options.unpacked)
        jax.block_until_ready(generator._state)
        print(f"{side}: drawn in {time.perf_counter() - start:.1f} s", flush=True)
        for work in options.work.split(","):
            try:
                found[work][side] = measured(generator, work, options)
            except Exception as error:  # one kernel that fails must not hide the others
                print(f"{side} {work}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
                continue
            ms, base = found[work][side]["ms"], found[work].get("plain", {}).get("ms")
            ratio = f"{ms / base:.3f} of plain" if base else ""
            print(f"{work:10} {side:9} {ms:9.3f} ms  {ratio}", flush=True)
            for name, taken in found[work][side].get("kernels", {}).items():
                print(f"      {taken:9.3f} ms  {name}", flush=True)
        del generator
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        device = jax.devices()[0]
        with options.out.open("a") as file:
            for work, sides in found.items():
                row = {
                    "work": f"prefill of {PROMPT} tokens"
                    if work == "prefill"
                    else f"decode step, batch {work.split()[1]}",
                    "context": 0 if work == "prefill" else CONTEXT,
                    "layers": options.layers,
                    **{f"{side}_ms": round(of["ms"], 4) for side, of in sides.items()},
                    **{f"{side}_spread_ms": [round(x, 4) for x in of["spread"]] for side, of in sides.items()},
                    "model": "Qwen3-8B shape, random weights",
                    "dtype": "bfloat16",
                    "device": device.device_kind,
                    "jax": jax.__version__,
                    "commit": _commit(),
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }
                file.write(json.dumps(row) + "\n")


def measured(generator: Generator, work: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per prefill or step, the quartiles, and the kernels if asked for."""
    prefill, decode = generator._compiled(Sampling())
    draws = np.random.default_rng(0)
    vocabulary = generator.config.vocab_size
    if work == "prefill":
        batch, steps, run, capacity = 1, 1, prefill, PROMPT
        tokens = jnp.asarray(draws.integers(0, vocabulary, (1, PROMPT), np.int32))
        where = jnp.full(1, PROMPT, jnp.int32)
    else:
        batch, steps, run = int(work.split()[1]), options.steps, decode
        capacity = CONTEXT + 128
        tokens = jnp.asarray(draws.integers(0, vocabulary, batch, np.int32))
        where = jnp.full(batch, CONTEXT, jnp.int32)
    seeds, cache = jnp.zeros(batch, jnp.uint32), generator.new_cache(batch, capacity)
    start = time.perf_counter()
    step, cache = run(generator._state, tokens, where, seeds, cache)
    step.tokens.block_until_ready()
    print(f"  compiled in {time.perf_counter() - start:.1f} s", flush=True)
    times = []
    for _ in range(options.groups + 1):
        start = time.perf_counter()
        for _ in range(steps):
            step, cache = run(generator._state, tokens, where, seeds, cache)
        step.tokens.block_until_ready()
        times.append(1e3 * (time.perf_counter() - start) / steps)
    times = times[1:]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    found: dict[str, Any] = {"ms": median, "spread": [low, high]}
    if options.kernels:
        # `profiler.measure` would compile the step once more, without donating the cache.
        from jax._src.lib import mosaic_gpu

        cupti = mosaic_gpu._mosaic_gpu_ext
        cupti._cupti_init()
        run(generator._state, tokens, where, seeds, cache)[0].tokens.block_until_ready()
        kernels = cupti._cupti_get_timings(True)
        total: dict[str, float] = collections.defaultdict(float)
        for name, taken in kernels:
            total[name[:70]] += taken
        found["kernels"] = dict(sorted(total.items(), key=lambda item: -item[1])[:18])
        found["kernels"][f"all {len(kernels)} kernels"] = sum(taken for _, taken in kernels)
    return found


if __name__ == "__main__":
    main()
