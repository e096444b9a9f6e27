"""What hopper_stages.py and hopper_attention.py share: programs compile side by side, then they are measured in turn.

A row holds, for ``ours`` and ``baseline``, ``_us`` (median), ``_spread_us`` (quartiles) and ``_kernels``, in the time that
kernels take (CUPTI); ``ratio`` (baseline over ours: more is faster); ``ours_tflops`` where there are products; ``of_copy`` and
``baseline_of_copy`` where bytes matter: their bandwidth over that of a copy, ``copy_tbs``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tbik_jax.bench import Device, Run, _key, device, quartiles, surroundings

Array = jax.Array

#: Twice the L2 cache. Less than that stays there from one run to the next, and says nothing about memory.
_LEAST_BYTES = 100e6


@dataclass(frozen=True)
class Case:
    """A row to be measured: two programs on the same operands.

    Attributes:
        row: What identifies it, with `suite`.
        draw: The operands, from a key.
        baseline_is: What the other program runs.
        bytes: What one call has to read and to write, if that is what it waits for.
        flop: Of one call's products.
        calls: How often a program does its work, each time on other operands.
    """

    row: dict[str, Any]
    draw: Callable[[Array], tuple[Any, ...]]
    ours: Callable[..., Any]
    baseline: Callable[..., Any]
    baseline_is: str
    bytes: float = 0
    flop: float = 0
    calls: int = 1

    @cached_property
    def operands(self) -> tuple[Any, ...]:
        return jax.eval_shape(self.draw, jax.eval_shape(_key))


def normal(key: Array, operands: Sequence[jax.ShapeDtypeStruct]) -> tuple[Array, ...]:
    keys = jax.random.split(key, len(operands))
    return tuple(jax.random.normal(k, of.shape, of.dtype) for k, of in zip(keys, operands, strict=True))


def rows(cases: Sequence[Case], repeat: int, limit_seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """A row per case, as soon as it is known; with ``error`` if it failed. After ``limit_seconds`` no further one begins."""
    begin, where = time.monotonic(), device()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        plans = [_submit(pool, case, where) for case in cases]
        # Before anything is measured: XLA runs candidates while it compiles.
        wait([future for plan in plans for future in plan.values()], timeout=limit_seconds)
        copy = _copy_tbs(where, repeat)
        for case, plan in zip(cases, plans, strict=True):
            if limit_seconds is not None and time.monotonic() - begin > limit_seconds:
                return
            try:
                found = _measured(case, plan, where, repeat, copy)
            except Exception as error:  # one case that fails must not hide the others
                found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            common = {**surroundings(where, "bfloat16"), "baseline": case.baseline_is}
            yield {**case.row, **found, "repeats": repeat, **common}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, case: Case, where: Device) -> dict[str, Future[Any]]:
    def compiled(name: str) -> Any:
        return _compiled(getattr(case, name), case.operands, where)

    plan = {name: pool.submit(compiled, name) for name in ("ours", "baseline")}
    return plan | {"draw": pool.submit(lambda: jax.jit(case.draw).lower(jax.eval_shape(_key)).compile())}


def _compiled(f: Callable[..., Any], operands: Sequence[Any], where: Device) -> Any:
    return jax.jit(f).lower(*operands).compile(where.options(baseline=False))


def _copy_tbs(where: Device, repeat: int) -> float:
    """Of 256 MiB, counted twice: read and written."""
    x = jnp.ones(1 << 26, jnp.uint32)
    run = Run(_compiled(lambda x: x ^ 1, (x,), where), (x,))
    return 2 * x.nbytes / statistics.median(where.time({"copy": run}, repeat)["copy"][0]) / 1e9


def _measured(case: Case, plan: dict[str, Future[Any]], where: Device, repeat: int, copy: float) -> dict[str, Any]:
    """The part of a row that is measured; of ours alone, with ``error``, if there is no baseline."""
    operands = plan["draw"].result()(_key())
    runs = {"ours": Run(plan["ours"].result(), operands)}
    found: dict[str, Any] = {}
    if problem := plan["baseline"].exception():
        found["error"] = f"baseline: {type(problem).__name__}: {problem}"[:2000]
    else:
        runs["baseline"] = Run(plan["baseline"].result(), operands)
    for name, (milliseconds, kernels) in where.time(runs, repeat).items():
        low, median, high = quartiles([1e3 * taken / case.calls for taken in milliseconds])
        found[f"{name}_us"] = round(median, 3)
        found[f"{name}_spread_us"] = [round(low, 3), round(high, 3)]
        found[f"{name}_kernels"] = kernels
        if case.bytes * case.calls > _LEAST_BYTES:
            found["of_copy" if name == "ours" else "baseline_of_copy"] = round(case.bytes / median / 1e6 / copy, 3)
            found["copy_tbs"] = round(copy, 3)
    if case.flop:
        found["ours_tflops"] = round(case.flop / found["ours_us"] / 1e6, 1)
    if "baseline" in runs:
        found["ratio"] = round(found["baseline_us"] / found["ours_us"], 4)
    return found


def main(description: str, suites: dict[str, Callable[[], list[Case]]], out: str) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default=",".join(suites))
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--limit-seconds", type=float, help="begin no further row after so long")
    parser.add_argument("--out", type=Path, help=f"append rows that did not fail, as in benchmarks/rows/{out}")
    options = parser.parse_args()
    cases = [case for suite in options.suites.split(",") for case in suites[suite]()]
    names = list(dict.fromkeys(name for case in cases for name in case.row))
    for row in rows(cases, options.repeat, options.limit_seconds):
        print(_line(row, names), flush=True)
        if options.out and "error" not in row:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _line(row: dict[str, Any], names: Sequence[str]) -> str:
    numbers = [f"{side} {row[f'{side}_us']:9.1f} us" for side in ("ours", "baseline") if f"{side}_us" in row]
    numbers += [f"{name} {row[name]:.3f}" for name in ("ratio", "of_copy", "ours_tflops") if name in row]
    named = ", ".join(f"{name} {row[name]}" for name in names if name in row)
    return "  ".join([f"{named:80}", *numbers, row.get("error", "")]).rstrip()
