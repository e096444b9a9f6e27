"""Several devices: bits and times of the collectives, and whole models on every mesh. One call does everything and writes rows.

    python benchmarks/multi_gpu.py --out benchmarks/rows/multi_gpu.jsonl          # all GPUs of this host
    python benchmarks/multi_gpu.py --cpu-devices 8 --model tiny                   # virtual CPU devices
    python benchmarks/multi_gpu.py --coordinator host0:9876 --processes 2 --process 0   # and --process 1 on the other host

Sections: `collectives` (every algorithm of `tree_psum` and `tree_psum_scatter` against `psum` and `psum_scatter`, f32, one
node per rank), `bits` (digests of all logits for every tensor-parallel size and batch, and of ranks that one device
emulates), `model` (prefill and decode against plain numerics; GPUs only). Rows of `bits` name the digest, so that runs on
different meshes, process counts and hosts can be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SECTIONS = ("collectives", "bits", "model")
ALGORITHMS = ("auto", "all_gather", "all_to_all", "recursive_halving", "butterfly", "direct")
LENGTHS = (5, 40, 140, 23, 77, 9, 61, 18)
#: Operations that follow one another in a program, so that launches from the host do not count.
_CHAIN = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument(
        "--tp", default="", help="tensor-parallel sizes; default: 1, 2, 4, 8 as far as there are devices"
    )
    parser.add_argument("--kibibytes", default="4,64,1024,16384,262144", help="sizes of a node")
    parser.add_argument(
        "--model",
        default="qwen3-8b",
        help="of bits: qwen3-8b, tiny (both with random weights), smollm2; one or several",
    )
    parser.add_argument("--layers", type=int, default=36, help="of qwen3-8b")
    parser.add_argument("--batches", default="8,16,32")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--work", default="prefill,decode 16")
    parser.add_argument("--emulate", default="", help="tensor-parallel sizes to emulate on one device, too")
    parser.add_argument("--sides", default="plain,chain,balanced", help="of the models")
    parser.add_argument(
        "--algorithms", default="auto", help="of the models' collectives; auto: what Generator takes on this mesh"
    )
    parser.add_argument("--kernels", action="store_true", help="also print what the models' kernels take, of all GPUs")
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cpu-devices", type=int, help="virtual CPU devices of this process")
    parser.add_argument("--coordinator", help="address:port of process 0, for several processes")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if options.coordinator:
        if options.cpu_devices:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    sizes = [int(n) for n in options.tp.split(",") if n] or [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    begin = time.perf_counter()
    common = surroundings()
    say(f"{common['device']}, {options.processes} processes, jax {jax.__version__}")
    rows = Rows(options.out, common)
    for section in options.sections.split(","):
        for row in {"collectives": collectives, "bits": bits, "model": model}[section](sizes, options):
            rows.add(section, row)
        say(f"[{time.perf_counter() - begin:.0f} s] {section} done")
    if not rows.hold:
        raise SystemExit(1)


def say(text: str) -> None:
    """Once, however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


def mesh_of(ranks: int) -> Mesh | None:
    """``ranks`` devices, of all processes in turn; None where this process has none of them."""
    of_process: dict[int, int] = {}
    order = []
    for device in jax.devices():
        place = of_process[device.process_index] = of_process.get(device.process_index, -1) + 1
        order.append((place, device.process_index, device))
    chosen = [device for _, _, device in sorted(order, key=lambda item: item[:2])][:ranks]
    if all(device.process_index != jax.process_index() for device in chosen):
        return None
    return Mesh(np.array(chosen).reshape(1, ranks), ("dp", "tp"))


class Rows:
    """Prints rows, writes them from process 0, and remembers whether all bits were equal."""

    def __init__(self, path: Path | None, common: dict[str, Any]) -> None:
        self.path, self.common, self.hold = path, common, True

    def add(self, section: str, row: dict[str, Any]) -> None:
        """One more."""
        self.hold &= row.get("bits") in (None, "equal")
        say("  ".join(f"{key} {value}" for key, value in {"section": section, **row}.items()))
        if self.path is not None and jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"section": section, **row, **self.common}) + "\n")


def surroundings() -> dict[str, Any]:
    """What every row says."""
    from tbik_jax.bench import _commit

    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# Collectives ---------------------------------------------------------------------------------------------------------


def collectives(sizes: Sequence[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One f32 node per rank, balanced tree: bits against the tree on the host, time against what JAX does."""
    for ranks in sizes:
        if ranks == 1:
            continue
        mesh = mesh_of(ranks)
        if mesh is None:
            continue
        for kibibytes in (int(n) for n in options.kibibytes.split(",")):
            n = -(-kibibytes * 256 // ranks) * ranks
            x = jax.jit(
                lambda ranks=ranks, n=n: jax.random.normal(jax.random.key(0), (ranks, n), jnp.float32),
                out_shardings=NamedSharding(mesh, P("tp")),
            )()
            for scatter in (False, True):
                base: float | None = None
                for algorithm in ("psum", *ALGORITHMS):
                    row = _one_collective(mesh, x, ranks, n, scatter, algorithm, base, options)
                    if algorithm == "psum":
                        base = row["us"]
                    yield row


def _one_collective(
    mesh: Mesh, x: Any, ranks: int, n: int, scatter: bool, algorithm: str, base: float | None, options: Any
) -> dict[str, Any]:
    from tbik_jax import Tree, tree_psum, tree_psum_scatter

    tree, name = Tree(ranks), "scatter" if scatter else "sum"

    def once(v: Any) -> Any:
        if algorithm == "psum":
            return lax.psum_scatter(v, "tp", tiled=True) if scatter else lax.psum(v, "tp")
        if scatter:
            return tree_psum_scatter(v[None], "tp", tree=tree, algorithm=algorithm)
        return tree_psum(v[None], "tp", tree=tree, algorithm=algorithm)

    def chain(v: Any) -> Any:
        def step(_: Any, v: Any) -> Any:
            y = once(v) * np.float32(1 / ranks)
            y = jnp.tile(y, ranks) if scatter else y
            return lax.pcast(y, "tp", to="varying") if not scatter else y

        return lax.fori_loop(0, _CHAIN, step, v)

    def compiled(f: Callable[[Any], Any], out: P) -> Any:
        return (
            jax.jit(jax.shard_map(lambda v: f(v[0])[None], mesh=mesh, in_specs=P("tp"), out_specs=out))
            .lower(x)
            .compile()
        )

    row: dict[str, Any] = {"collective": name, "ranks": ranks, "kibibytes": n // 256, "algorithm": algorithm}
    try:
        run = compiled(chain, P("tp"))
        jax.block_until_ready(run(x))
        times = []
        for _ in range(options.groups):
            start = time.perf_counter()
            jax.block_until_ready(run(x))
            times.append(1e6 * (time.perf_counter() - start) / _CHAIN)
        row["us"] = round(statistics.median(times), 2)
        if base is not None:
            row["over_psum"] = round(row["us"] / base, 3)
            result = compiled(once, P("tp") if scatter else P(None))(x)
            row["bits"] = "equal" if _is_tree_sum(result, x, tree, scatter) else "DIFFERENT"
    except (ValueError, NotImplementedError) as error:  # an algorithm that this mesh cannot run
        row["refused"] = str(error).splitlines()[-1].strip()[:120]
    return row


def _is_tree_sum(result: Any, x: Any, tree: Any, scatter: bool) -> bool:
    """Every shard that this process holds, against the tree over all ranks' values."""
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
    values = np.asarray(whole.addressable_data(0))
    want = tree.reduce(list(values), np.add)
    equal = True
    for shard in result.addressable_shards:
        got = np.asarray(shard.data)[0]
        part = want
        if scatter:
            rank = shard.index[0].start or 0
            part = want[rank * got.size : (rank + 1) * got.size]
        equal &= got.tobytes() == part.tobytes()
    return equal


# Models --------------------------------------------------------------------------------------------------------------


def _model(name: str, options: argparse.Namespace) -> tuple[Any, Callable[..., Any]]:
    """A configuration, and ``make(numerics, mesh, ranks)``."""
    if name == "qwen3-8b":
        from tbik_jax.models.drawn import QWEN3_8B, draw

        config, dtype = dataclasses.replace(QWEN3_8B, num_layers=options.layers), "bfloat16"
        return config, lambda numerics, mesh, ranks=None: draw(config, numerics, mesh, dtype=dtype, ranks=ranks)
    from tbik_jax.models.loading import load

    if name == "tiny":
        from tbik_jax.models.random import TINY, RandomSource

        config, tensors = TINY, RandomSource(TINY)
    elif name == "smollm2":
        from tbik_jax.models.open import open_model

        opened = open_model(name)
        config, tensors = opened.config, opened.source
    else:
        raise ValueError(f"--model {name!r}: choose from qwen3-8b, tiny, smollm2")
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return config, lambda numerics, mesh, ranks=None: load(config, tensors, numerics, mesh, dtype=dtype, ranks=ranks)


def bits(sizes: Sequence[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Greedy continuations of eight prompts, as many batches; digests of all their logits."""
    for name in options.model.split(","):
        yield from _bits_of(name, sizes, options)


def _bits_of(name: str, sizes: Sequence[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from tbik_jax.engine import Generator
    from tbik_jax.numerics import Numerics
    from tbik_jax.testing import digest

    config, make = _model(name, options)
    prompts = [np.random.default_rng([i, n]).integers(0, config.vocab_size, n).tolist() for i, n in enumerate(LENGTHS)]
    emulated = [int(n) for n in options.emulate.split(",") if n]
    first: str | None = None
    for tp, alone in [*((tp, False) for tp in sizes), *((tp, True) for tp in emulated)]:
        mesh = mesh_of(1 if alone else tp)
        if mesh is None:
            continue
        generator = Generator(make(Numerics.invariant(), mesh, tp if alone else None), mesh, emulate=alone)
        for batch in (int(n) for n in options.batches.split(",")):
            filled = [prompts[i % len(prompts)] for i in range(batch)]
            found = generator.generate(filled, options.new_tokens, with_logits=True)[: len(prompts)]
            of_logits = digest(*(g.logits for g in found))
            first = first or of_logits
            yield {
                "model": name,
                "layers": config.num_layers,
                "tp": tp,
                "emulated": alone,
                "batch": batch,
                "digest": of_logits,
                "bits": "equal" if of_logits == first else "DIFFERENT",
            }
        del generator


def model(sizes: Sequence[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prefill and decode steps, invariant against plain, at every tensor-parallel size."""
    import hopper_model

    from tbik_jax.contract import Contract
    from tbik_jax.engine import Generator
    from tbik_jax.numerics import Numerics

    config, make = _model("qwen3-8b", options)
    sides = {
        ("plain", "psum"): hopper_model.Cudnn(),
        **{
            (tree, algorithm): Numerics.invariant(Contract(tree=arities), algorithm=algorithm)
            for algorithm in options.algorithms.split(",")
            for tree, arities in (("chain", (8,)), ("balanced", (2,)))
        },
    }
    wanted = options.sides.split(",")
    for tp in sizes:
        mesh, plain = mesh_of(tp), {}
        if mesh is None:
            continue
        for (side, algorithm), numerics in sides.items():
            if side not in wanted:
                continue
            generator = Generator(make(numerics, mesh), mesh)
            for work in options.work.split(","):
                found = hopper_model.measured(generator, work, options)
                plain.setdefault(work, found["ms"])
                for name, taken in found.get("kernels", {}).items():
                    say(f"      {taken:9.3f} ms  {name}")
                yield {
                    "work": work,
                    "layers": config.num_layers,
                    "tp": tp,
                    "numerics": side,
                    "algorithm": getattr(generator.numerics, "algorithm", algorithm),
                    "ms": round(found["ms"], 3),
                    "over_plain": round(found["ms"] / plain[work], 3),
                }
            del generator


if __name__ == "__main__":
    main()
