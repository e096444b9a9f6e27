"""Whole models on one GPU: every way to run them, and how many different digests of all logits come of it.

    python benchmarks/hopper_bits.py [--models smollm2,qwen3] [--out benchmarks/rows/hopper_bits.jsonl]

`smollm2` has its real weights; `qwen3` has Qwen3-8B's sizes but few layers and tokens, `tiny` is tiny, and both have random
weights. Ways: one forward on one rank and on 2, 3, 4 and 8 ranks that this device emulates; chunks of 1 (decoding), 7, 64 and
256 through the KV cache; a prompt alone and in batches of 3, 17 and 64, a few tokens further. Plain numerics beside it. Every
way is a process of its own, so that all of them compile side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LENGTHS = (5, 140, 601)
#: Tokens of the prompt that is continued in batches of several sizes, and how many more.
PROMPT, NEW = 140, 6
#: Of qwen3, less than the real one: the logits of all positions go to the host.
VOCABULARY = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2,qwen3")
    parser.add_argument("--layers", type=int, default=2, help="of qwen3")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tree", default="2")
    parser.add_argument("--ranks", default="2,3,4,8")
    parser.add_argument("--chunks", default="1,7,64,256")
    parser.add_argument("--batches", default="1,3,17,64")
    parser.add_argument("--sides", default="invariant,plain")
    parser.add_argument("--processes", type=int, default=12, help="at a time")
    parser.add_argument("--seconds", type=float, default=600, help="for each way")
    parser.add_argument("--way", help="run this one here: model/side/way")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one_way(options)))
        return
    ways = ["forward 1"]
    for kind, sizes in (("forward", options.ranks), ("chunks", options.chunks), ("batch", options.batches)):
        ways += [f"{kind} {size}" for size in sizes.split(",") if size]
    tasks = [
        f"{m}/{side}/{way}" for m in options.models.split(",") for side in options.sides.split(",") for way in ways
    ]
    begin, found = time.perf_counter(), {}

    def run(task: str) -> dict[str, Any]:
        shared = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several processes, one device
        command = [sys.executable, *sys.argv, "--way", task]
        try:
            done = subprocess.run(
                command, env=shared, capture_output=True, text=True, timeout=options.seconds, check=False
            )
            result = (
                json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-1500:]}
            )
        except subprocess.TimeoutExpired:
            result = {"error": "out of time"}
        text = result.get("digest", result.get("error", ""))
        print(f"[{time.perf_counter() - begin:5.0f} s] {text[-24:]:24}  {task}", flush=True)
        return result

    with ThreadPoolExecutor(options.processes) as pool:
        found = dict(zip(tasks, pool.map(run, tasks), strict=True))
    failed = False
    for model in options.models.split(","):
        for side in options.sides.split(","):
            of = {task.split("/")[2]: result for task, result in found.items() if task.startswith(f"{model}/{side}/")}
            digests = {way: result["digest"] for way, result in of.items() if "digest" in result}
            positions = {digest for way, digest in digests.items() if not way.startswith("batch")}
            continuations = {digest for way, digest in digests.items() if way.startswith("batch")}
            print(
                f"{model} {side}: {len(of)} ways, {len(of) - len(digests)} failed; all positions {len(positions)} digests, ",
                end="",
            )
            print(f"continuations {len(continuations)}")
            failed |= len(digests) < len(of)
            if side == "invariant":
                failed |= len(positions) > 1 or len(continuations) > 1
            if options.out and digests:
                row = {
                    "model": model,
                    "numerics": side,
                    "dtype": options.dtype,
                    "ways": digests,
                    "digests_of_all_positions": len(positions),
                    "digests_of_continuations": len(continuations),
                    **next(result["where"] for result in of.values() if "where" in result),
                }
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if failed:
        raise SystemExit(1)


def one_way(options: argparse.Namespace) -> dict[str, Any]:
    """The digest of all logits of one way to run one model."""
    import jax
    import numpy as np

    from tbik_jax.bench import _commit
    from tbik_jax.contract import Contract
    from tbik_jax.engine import Generator, make_mesh
    from tbik_jax.models.loading import load
    from tbik_jax.numerics import Numerics
    from tbik_jax.testing import digest

    name, side, way = options.way.split("/")
    kind, size = way.split()
    contract = Contract(tree=tuple(int(a) for a in options.tree.split(",")))
    numerics = Numerics.invariant(contract) if side == "invariant" else Numerics.plain(contract)
    mesh, ranks = make_mesh(), int(size) if kind == "forward" and int(size) > 1 else None
    if name == "qwen3":
        from tbik_jax.models.drawn import QWEN3_8B, draw

        config = dataclasses.replace(QWEN3_8B, num_layers=options.layers, vocab_size=VOCABULARY)
        model = draw(config, numerics, mesh, dtype=options.dtype, ranks=ranks)
    else:
        if name == "tiny":
            from tbik_jax.models.random import TINY as config
            from tbik_jax.models.random import RandomSource

            source: Any = RandomSource(config)
        else:
            from tbik_jax.models.open import open_model

            opened = open_model(name)
            config, source = opened.config, opened.source
        model = load(config, source, numerics, mesh, dtype=options.dtype, ranks=ranks)
    run = Generator(model, mesh, emulate=ranks is not None)
    prompts = [np.random.default_rng([i, n]).integers(0, config.vocab_size, n).tolist() for i, n in enumerate(LENGTHS)]
    if kind == "forward":
        found = digest(*run.score(prompts))
    elif kind == "chunks":
        found = digest(*run.score_in_chunks(prompts, int(size)))
    else:
        prompt = prompts[-1][:PROMPT]
        others = [prompt[: 3 + 7 * i % PROMPT] for i in range(1, int(size))]
        found = digest(run.generate([prompt, *others], NEW, with_logits=True)[0].logits)
    where = {
        "contract": contract.to_dict(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return {"digest": found, "where": where}


if __name__ == "__main__":
    main()
