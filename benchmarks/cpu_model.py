"""SmolLM2-135M on the CPU: invariant numerics against plain ones, in one process, in turn.

    python benchmarks/cpu_model.py [--dtypes float32,bfloat16] [--tp 1] [--out benchmarks/rows/cpu_model.jsonl]

Work: a prefill of 256 tokens (logits of the last), and decode steps at batch 1, 4 and 16 with 256 tokens of context.
A row holds the median and the spread of both, and the median of the ratios of neighbouring runs, which the drift of a
shared machine moves less than the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.tp)

    import numpy as np

    from tbik_jax.engine import Generator, Sampling, make_mesh
    from tbik_jax.models.loading import load
    from tbik_jax.models.open import open_model
    from tbik_jax.numerics import Numerics

    opened, mesh = open_model(options.model), make_mesh(tp=options.tp)
    rows = []
    for dtype in options.dtypes.split(","):
        sides = {
            numerics.kind: Generator(load(opened.config, opened.source, numerics, mesh, dtype=dtype), mesh)
            for numerics in (Numerics.plain(), Numerics.invariant())
        }
        work = [("prefill", 1)] + [("decode", int(b)) for b in options.batches.split(",")]
        for name, batch in work:
            runs = {kind: _program(side, name, batch, np, Sampling) for kind, side in sides.items()}
            times: dict[str, list[float]] = {kind: [] for kind in runs}
            for run in runs.values():
                run()
            repeats = options.repeats * (1 if name == "prefill" else 3)
            for i in range(repeats):
                for kind in sorted(runs, reverse=bool(i % 2)):
                    start = time.perf_counter()
                    runs[kind]()
                    times[kind].append(1e3 * (time.perf_counter() - start))
            ratios = [a / b for a, b in zip(times["invariant"], times["plain"], strict=True)]
            row = {
                "work": f"{name} of 256 tokens" if name == "prefill" else f"decode step, batch {batch}",
                "dtype": dtype,
                "tp": options.tp,
                "plain_ms": round(statistics.median(times["plain"]), 3),
                "invariant_ms": round(statistics.median(times["invariant"]), 3),
                "plain_spread_ms": [round(min(times["plain"]), 3), round(max(times["plain"]), 3)],
                "invariant_spread_ms": [round(min(times["invariant"]), 3), round(max(times["invariant"]), 3)],
                "ratio": round(statistics.median(ratios), 3),
                "repeats": repeats,
                "model": opened.name,
                "jax": jax.__version__,
                "python": platform.python_version(),
                "device": _processor(),
                "commit": _commit(),
            }
            print(
                f"{dtype:9} tp {options.tp}  {row['work']:24} plain {row['plain_ms']:8.2f} ms   "
                f"invariant {row['invariant_ms']:8.2f} ms   ratio {row['ratio']:.3f}",
                flush=True,
            )
            rows.append(row)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _program(side, name, batch, np, Sampling):
    """A closure that runs one prefill or one decode step to its end."""
    prefill, decode = side._compiled(Sampling())
    generator = np.random.default_rng(0)
    seeds, lengths = np.zeros(batch, np.uint32), np.full(batch, 256, np.int32)
    if name == "prefill":
        tokens = generator.integers(0, side.config.vocab_size, (batch, 256), np.int32)
        held = {"cache": side.new_cache(batch, 256)}

        def run() -> None:
            step, held["cache"] = prefill(side._state, tokens, lengths, seeds, held["cache"])
            step.tokens.block_until_ready()

        return run
    tokens = generator.integers(0, side.config.vocab_size, batch, np.int32)
    held = {"cache": side.new_cache(batch, 320)}

    def run() -> None:
        step, held["cache"] = decode(side._state, tokens, lengths, seeds, held["cache"])
        step.tokens.block_until_ready()

    return run


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    isa = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{names[0] if names else platform.machine()} ({isa}), {len(names)} cores"


def _commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
