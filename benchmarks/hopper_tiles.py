"""Other tiles than those chosen by shape: which settings of `Tiles` and `SmallTiles` pay on this card. Bits are compared too.

python benchmarks/hopper_tiles.py --suites large,weight-gradient,input-gradient --change late_sums=False --change end_pairs=False
python benchmarks/hopper_tiles.py --suites small --rows 1,16 --change columns=16 --change depth=64,stages=8

Prints, for each product, the baseline's time over that of the chosen tiles and over each change (more is faster). `!` marks
other bits, `-` a change that the product's kernel does not have. Every program is compiled before anything is measured.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import statistics
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbik_jax import bench
from tbik_jax.kernels.matmul import hopper

Array = jax.Array
DTYPE = "bfloat16"


class Changed:
    """The tiles of a shape with some fields changed, and what became of them."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields, self.name = fields, ",".join(f"{key}={value}" for key, value in fields.items()) or "chosen"
        self.seen = threading.local()

    def __call__(self, tiles: Any) -> Any:
        self.seen.has = all(hasattr(tiles, key) for key in self.fields)
        return dataclasses.replace(tiles, **self.fields) if self.seen.has else tiles


def lowered(group: bench._Group, change: Changed) -> Any:
    """The program of all pairs of operands; None if their kernel has no such field, or refuses the value."""
    case, where = group.cases[0], group.where
    product, tree = case.product, bench._tree(case)
    of_a, of_b = product.by_leaf

    @jax.jit
    def one(a: Array, b: Array) -> Array:
        a, b = a.reshape(of_a), b.reshape(of_b)
        return hopper.product(product.spec, a, b, (tree.root,), dtype=jnp.dtype(DTYPE), tiles=change)

    def run(a: list[Array], b: list[Array]) -> list[Array]:
        return [one(x, w) for x, w in zip(a, b, strict=True)]

    try:
        program = jax.jit(run).lower(group.drawn[0][product.m], group.drawn[1])
    except ValueError:
        return None
    return program.compile(where.options(baseline=False)) if change.seen.has else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default="large,weight-gradient,input-gradient")
    parser.add_argument("--models", default="qwen3-8b")
    parser.add_argument("--trees", default="balanced,chain")
    parser.add_argument("--rows", default="1,8192", help="of tokens, where a suite has several")
    parser.add_argument(
        "--change", action="append", default=[], help="field=value[,field=value]; repeat for more columns"
    )
    parser.add_argument("--repeat", type=int, default=6)
    options = parser.parse_args()
    changes = [Changed({}), *(Changed(_fields(text)) for text in options.change)]
    where = bench.device()
    rows = {int(m) for m in options.rows.split(",")}
    cases = bench.cases(options.suites.split(","), options.models.split(","), options.trees.split(","))
    cases = [case for case in cases if case.product.m in rows]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        plans = []
        for case in cases:
            group = bench._Group([case], where, DTYPE)
            plan: dict[Any, Future[Any]] = {change: pool.submit(lowered, group, change) for change in changes}
            plan["draw"] = pool.submit(group.compile_draw)
            plan["theirs"] = pool.submit(
                lambda g=group: g.lower_theirs(g.cases[0]).compile(where.options(baseline=True))
            )
            plans.append((group, plan))
        wait([future for _, plan in plans for future in plan.values()])
    print(f"{where.name}, jax {jax.__version__}, against {where.baseline}")
    print(f"{'product':44} {'tree':9} {where.baseline + ' us':>10}  " + "  ".join(change.name for change in changes))
    for group, plan in plans:
        print(measured(group, plan, changes, options.repeat), flush=True)


def measured(group: bench._Group, plan: dict[Any, Future[Any]], changes: Sequence[Changed], repeat: int) -> str:
    case = group.cases[0]
    a, b = plan["draw"].result()[0](bench._key())
    runs = {"theirs": bench.Run(plan["theirs"].result(), (a[case.product.m], b))}
    for change in changes:
        if (program := plan[change].result()) is not None:
            runs[change.name] = bench.Run(program, (a[case.product.m], b))
    right = np.asarray(runs["chosen"]()[0])
    microseconds = {
        name: 1e3 * statistics.median(times) / group.copies
        for name, (times, _) in group.where.time(runs, repeat).items()
    }
    cells = []
    for change in changes:
        cell = "-"
        if change.name in runs:
            same = np.array_equal(np.asarray(runs[change.name]()[0]).view(np.uint16), right.view(np.uint16))
            cell = f"{microseconds['theirs'] / microseconds[change.name]:.3f}{'' if same else '!'}"
        cells.append(cell.rjust(len(change.name)))
    return f"{case.product!s:44} {case.tree:9} {microseconds['theirs']:10.2f}  " + "  ".join(cells)


def _fields(text: str) -> dict[str, Any]:
    return {key: ast.literal_eval(value) for key, value in (part.split("=") for part in text.split(","))}


if __name__ == "__main__":
    main()
