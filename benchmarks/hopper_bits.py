"""Whole models on one GPU: every way to run them, and how many different digests of all logits come of it.

    python benchmarks/hopper_bits.py [--models smollm2,qwen3] [--out benchmarks/rows/hopper_bits.jsonl]

`smollm2` has its real weights; `qwen3` has Qwen3-8B's sizes but few layers, and random weights. Ways: one forward on one rank
and on 2, 3, 4 and 8 ranks that this GPU emulates; chunks of 1 (decoding), 7, 64 and 256 through the KV cache; prompts alone
and in batches of 3, 17 and 64, a few tokens further. Plain numerics beside it. Programs compile side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tbik_jax.bench import _commit
from tbik_jax.contract import Contract
from tbik_jax.engine import Generator, make_mesh
from tbik_jax.models.drawn import QWEN3_8B, draw
from tbik_jax.numerics import Numerics
from tbik_jax.testing import digest

LENGTHS = (5, 140, 601)
#: Tokens of the prompt that is continued in batches of several sizes, and how many more.
PROMPT, NEW = 140, 6
#: Of qwen3, less than the real one: the logits of all positions go to the host.
_VOCABULARY = 16384


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
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    contract = Contract(tree=tuple(int(a) for a in options.tree.split(",")))
    begin = time.perf_counter()
    for name in options.models.split(","):
        make, vocabulary = source(name, options)
        prompts = [np.random.default_rng([i, n]).integers(0, vocabulary, n).tolist() for i, n in enumerate(LENGTHS)]
        for side in options.sides.split(","):
            numerics = Numerics.invariant(contract) if side == "invariant" else Numerics.plain(contract)
            found = digests(make, numerics, prompts, options)
            row = {
                "model": name,
                "numerics": side,
                "dtype": options.dtype,
                "contract": contract.to_dict(),
                "ways": found,
                "digests_of_all_positions": len({d for way, d in found.items() if not way.startswith("batch")}),
                "digests_of_continuations": len({d for way, d in found.items() if way.startswith("batch")}),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "commit": _commit(),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            print(
                f"[{time.perf_counter() - begin:5.0f} s] {name} {side}: all positions {row['digests_of_all_positions']} digests, "
                f"continuations {row['digests_of_continuations']}",
                flush=True,
            )
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def source(name: str, options: argparse.Namespace) -> tuple[Callable[..., Generator], int]:
    """``make(numerics, ranks)``, and the size of the vocabulary."""
    mesh = make_mesh()
    if name == "smollm2":
        from tbik_jax.models.loading import load
        from tbik_jax.models.open import open_model
        from tbik_jax.models.source import CachedSource

        opened = open_model("smollm2")
        config, tensors = opened.config, CachedSource(opened.source)

        def model(numerics: Numerics, ranks: int | None) -> Any:
            return load(config, tensors, numerics, mesh, dtype=options.dtype, ranks=ranks)
    else:
        config = dataclasses.replace(QWEN3_8B, num_layers=options.layers, vocab_size=_VOCABULARY)

        def model(numerics: Numerics, ranks: int | None) -> Any:
            return draw(config, numerics, mesh, dtype=options.dtype, ranks=ranks)

    def make(numerics: Numerics, ranks: int = 1) -> Generator:
        return Generator(model(numerics, None if ranks == 1 else ranks), mesh, emulate=ranks > 1)

    return make, config.vocab_size


def digests(
    make: Callable[..., Generator], numerics: Numerics, prompts: list[list[int]], options: argparse.Namespace
) -> dict[str, str]:
    """The digest of every way; an error's text where there is none."""
    one = make(numerics)

    def emulated(ranks: int) -> str:
        return digest(*make(numerics, ranks).score(prompts))

    def chunks(size: int) -> str:
        return digest(*one.score_in_chunks(prompts, size))

    def batch(size: int) -> str:
        """One prompt's continuation, others of many lengths beside it."""
        prompt = prompts[-1][:PROMPT]
        others = [prompt[: 3 + 7 * i % PROMPT] for i in range(1, size)]
        return digest(one.generate([prompt, *others], NEW, with_logits=True)[0].logits)

    ways: dict[str, Callable[[], str]] = {"one forward": lambda: digest(*one.score(prompts))}
    for label, run, sizes in (
        ("{} ranks", emulated, options.ranks),
        ("chunks of {}", chunks, options.chunks),
        ("batch of {}", batch, options.batches),
    ):
        ways |= {label.format(size): partial(run, int(size)) for size in sizes.split(",") if size}

    def guarded(name: str) -> str:
        try:
            found = ways[name]()
        except Exception as error:  # one way that fails must not hide the others
            found = f"{type(error).__name__}: {error}"[:2000]
        print(f"    {found:24.24}  {numerics.kind}, {name}", flush=True)
        return found

    with ThreadPoolExecutor(options.threads) as pool:
        return dict(zip(ways, pool.map(guarded, ways), strict=True))


if __name__ == "__main__":
    main()
