"""How fast the tree's products are on this device, against the vendor's library, and whether the bits are the tree's.

A case is one product of one model. Cases that share operands are a group: operands are drawn once, at the largest number
of rows, and the values of the leaves are computed once, so that every result is compared to a tree added outside of any
kernel, and fewer rows to the same rows among more.

On a Hopper GPU, time is what the kernels of a call take (CUPTI), and `jnp.dot` runs cuBLAS; programs compile on all cores
while others are measured, and cuBLAS chooses its algorithms when nothing else runs. On a CPU, time is wall-clock, and
everything is compiled before.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tbik_jax.contract import Contract
from tbik_jax.kernels import exact
from tbik_jax.shapes import MODELS, Product, ProductShape, item_bytes, shape, shapes
from tbik_jax.tree import Tree

Array = jax.Array

SUITES = ("large", "small", "weight-gradient", "input-gradient")
TREES = ("balanced", "chain")
DTYPES = ("bfloat16", "float16", "float32")
BASELINES = ("cublas", "xla")
#: More than the L2 cache holds, three times over: what the small products read comes from memory.
_ROTATION_BYTES = 150e6
_MOST_COPIES = 64
_REPEATS = {"large": 10, "small": 20, "weight-gradient": 10, "input-gradient": 10}
_LAYERS = ("qkv", "attention_out", "gate_up", "down")


@dataclass(frozen=True)
class Case:
    """One row to be measured."""

    suite: str
    product: Product
    tree: str

    @property
    def group(self) -> tuple[Any, ...]:
        return self.suite, self.product.direction, self.product.shape, self.product.leaves


def default_models(backend: str) -> tuple[str, ...]:
    """What a device of that kind is measured on."""
    large = tuple(name for name in MODELS if name != "smollm2-135m")
    return ("smollm2-135m",) if backend == "cpu" else large


def cases(suites: Sequence[str], models: Sequence[str], trees: Sequence[str], *, backend: str = "gpu") -> list[Case]:
    """The cases of some suites, in the order in which they are measured, groups together.

    A tree over one or two leaves is the same under every name, and is measured once; small products, which wait for
    memory whatever the tree, take the first of ``trees`` alone. On a CPU there are fewer rows and no meshes.
    """
    cpu = backend == "cpu"
    found: list[Case] = []

    def add(suite: str, direction: str, layer: ProductShape, rows: Sequence[int], leaves: int) -> None:
        for tree in trees if leaves > 2 and suite != "small" else trees[:1]:
            found.extend(Case(suite, Product(direction, layer, m, leaves), tree) for m in rows)

    for suite in suites:
        for model in models:
            if suite == "large":
                rows = (256,) if cpu else (1024, 8192)
                for layer in shapes((model,), tp=(1,) if cpu else (8,)):
                    if not cpu or layer.parallel == "column":
                        add(suite, "forward", layer, rows, layer.leaves)
                for name in ("attention_out", "down"):
                    for tp, leaves in ((1, 8),) if cpu else ((1, 8), (4, 2), (2, 4), (1, 16)):
                        layer = shape(model, name, tp, Contract(leaves=leaves * tp))
                        add(suite, "forward", layer, rows, layer.leaves)
            elif suite == "small":
                for layer in shapes((model,), _LAYERS, (1,) if cpu else (1, 2, 4, 8)):
                    add(suite, "forward", layer, (1, 8, 16) if cpu else (1, 8, 16, 64, 128), layer.leaves)
            elif suite == "weight-gradient":
                for layer in shapes((model,), _LAYERS, (1,) if cpu else (8,)):
                    add(suite, suite, layer, (512,) if cpu else (8192,), 8)
            elif suite == "input-gradient":
                for layer in shapes((model,), _LAYERS, (1,) if cpu else (1, 8)):
                    leaves = Contract().leaves_for(layer.n * layer.tp) // layer.tp if layer.parallel == "column" else 1
                    add(suite, suite, layer, (256,) if cpu else (8192,), leaves)
            else:
                raise ValueError(f"suite {suite!r}: choose from {', '.join(SUITES)}")
    return found


@dataclass(frozen=True)
class Run:
    """A compiled program and what it is called with."""

    compiled: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)


class Device:
    """What is measured and how, on one kind of device; :func:`device` chooses.

    Programs take lists of operands, and multiply each pair of them.
    """

    backend = "cpu"
    #: What the baseline runs.
    baseline = "jnp.dot"
    timer = "wall clock"
    #: Whether a compilation beside it would disturb the timer.
    alone = True

    @property
    def name(self) -> str:
        return jax.devices()[0].device_kind

    def options(self, *, baseline: bool) -> dict[str, Any]:
        """Of XLA, for the program that is measured."""
        return {}

    def copies(self, case: Case, dtype: str) -> int:
        """How many pairs of operands take turns."""
        return 1

    def prepared(self, case: Case, b: Array) -> Any:
        """The second operand as a layer would hold it."""
        return b

    def leaves(self, product: Product, a: Array, b: Any) -> Array:
        """The value of every leaf, f32 ``[leaves, rows, columns]``."""
        raise NotImplementedError

    def product(self, case: Case, a: Array, b: Any, dtype: str) -> Array:
        """What this package computes."""
        raise NotImplementedError

    def time(self, programs: dict[str, Run], repeat: int) -> dict[str, tuple[list[float], list[str]]]:
        """Milliseconds of each run of each program, in turn, and the kernels that ran, if known."""
        raise NotImplementedError


class Cpu(Device):
    """The `cpu` family; weights are packed before, as inference packs them."""

    @property
    def name(self) -> str:
        cpuinfo = Path("/proc/cpuinfo")
        names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
        return f"CPU: {names[0] if names else platform.machine()}, {os.cpu_count()} cores"

    def prepared(self, case: Case, b: Array) -> Any:
        from tbik_jax.kernels import matmul

        if case.product.direction != "forward":
            return b
        return matmul.pack(b.reshape(case.product.by_leaf[1]).swapaxes(0, 1))

    def leaves(self, product: Product, a: Array, b: Any) -> Array:
        from tbik_jax.kernels import matmul

        first, second = product.spec.split("->")[0].split(",")
        x = jnp.einsum(f"{first}->mlk", a.reshape(product.by_leaf[0]))
        w = jnp.einsum(f"{second}->lnk", b.reshape(product.by_leaf[1])) if isinstance(b, jax.Array) else b
        return matmul.leaf_products(x, w)

    def product(self, case: Case, a: Array, b: Any, dtype: str) -> Array:
        return added(case, self.leaves(case.product, a, b), dtype)

    def time(self, programs: dict[str, Run], repeat: int) -> dict[str, tuple[list[float], list[str]]]:
        times: dict[str, list[float]] = {name: [] for name in programs}
        for run in programs.values():
            jax.block_until_ready(run())
        for i in range(repeat):
            for name in sorted(programs, reverse=bool(i % 2)):
                start = time.perf_counter()
                jax.block_until_ready(programs[name]())
                times[name].append(1e3 * (time.perf_counter() - start))
        return {name: (taken, []) for name, taken in times.items()}


class Hopper(Device):
    """The `sm90` family."""

    backend = "gpu"
    timer = "kernels (CUPTI)"
    alone = False

    def __init__(self, baseline: str) -> None:
        from tbik_jax.kernels.matmul import hopper

        self._multiply = hopper.product
        self.baseline = {"cublas": "cuBLAS", "xla": "jnp.dot"}[baseline]

    def options(self, *, baseline: bool) -> dict[str, Any]:
        # A command buffer may run independent products side by side, and the sum of their times would be no time.
        options: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}
        if baseline and self.baseline == "cuBLAS":
            options["xla_gpu_enable_triton_gemm"] = False
        return options

    def copies(self, case: Case, dtype: str) -> int:
        if case.suite != "small":
            return 1
        weight = math.prod(case.product.stored[1]) * item_bytes(dtype)
        return min(_MOST_COPIES, 1 + int(_ROTATION_BYTES / weight))

    def leaves(self, product: Product, a: Array, b: Any) -> Array:
        nodes = tuple(leaf for index in range(product.leaves) for leaf in Tree(product.leaves).nodes(index, index + 1))
        found = self._multiplied(product, a, b, nodes, "float32")
        return found.reshape(product.leaves, *product.result)

    def product(self, case: Case, a: Array, b: Any, dtype: str) -> Array:
        return self._multiplied(case.product, a, b, (_tree(case).root,), dtype)

    def _multiplied(self, product: Product, a: Array, b: Array, nodes: Any, dtype: str) -> Array:
        of_a, of_b = product.by_leaf
        return self._multiply(product.spec, a.reshape(of_a), b.reshape(of_b), nodes, dtype=jnp.dtype(dtype))

    def time(self, programs: dict[str, Run], repeat: int) -> dict[str, tuple[list[float], list[str]]]:
        times: dict[str, list[float]] = {name: [] for name in programs}
        kernels: dict[str, list[str]] = {name: [] for name in programs}
        for turn in range(2):
            for name in sorted(programs, reverse=bool(turn)):
                each = (repeat + 1 - turn) // 2
                if not each:
                    continue
                run = programs[name]
                runs = _profiled(run, each)
                if not runs:
                    raise RuntimeError(f"CUPTI saw no kernel of {name}; is another profiler attached?")
                for launched in runs if each > 1 else [runs]:
                    times[name].append(sum(taken for _, taken in launched))
                    kernels[name] = list(dict.fromkeys(kernel[:60] for kernel, _ in launched))
        return {name: (times[name], kernels[name]) for name in programs}


def _profiled(run: Run, times: int, attempts: int = 3) -> Any:
    """The kernels of so many runs, as CUPTI saw them.

    A program that compiles in another thread may launch kernels too. Runs that differ in their kernels betray it, and are
    done again.
    """
    from jax.experimental.mosaic.gpu import profiler

    measured = profiler.measure(run.compiled, aggregate=False, iterations=times)
    for _ in range(attempts - 1):
        try:
            return measured(*run.arguments)[1]
        except RuntimeError:
            continue
    return measured(*run.arguments)[1]


def device(baseline: str = "cublas") -> Device:
    """What this process measures: its default device.

    Raises:
        NotImplementedError: a device that the products do not run on.
    """
    first = jax.devices()[0]
    if first.platform == "cpu":
        return Cpu()
    capability = getattr(first, "compute_capability", "none")
    if first.platform in ("gpu", "cuda") and str(capability) == "9.0":
        return Hopper(baseline)
    raise NotImplementedError(
        f"bench: the default device is {first.device_kind} ({first.platform}, compute capability {capability}); the "
        "products run on CPUs and on Hopper GPUs (9.0). JAX_PLATFORMS=cpu measures the CPU"
    )


def added(case: Case, leaves: Array, dtype: str) -> Array:
    """The canonical tree over ``leaves [leaves, ...]``, rounded once."""
    return exact.cast(_tree(case).reduce(list(leaves), jnp.add), dtype)


def dot(case: Case, a: Array, b: Array, dtype: str) -> Array:
    """The baseline: the same operands, as a layer holds them."""
    first, second = case.product.spec.split("->")[0].split(",")
    a, b = a.T if first.startswith("l") else a, b if second.startswith("l") else b.T
    return jnp.dot(a, b, preferred_element_type=jnp.dtype(dtype))


def _tree(case: Case) -> Tree:
    leaves = case.product.leaves
    return Tree.chain(leaves) if case.tree == "chain" else Tree.balanced(leaves)


class _Group:
    """Cases with the same operands: what is compiled for them, and what is drawn."""

    def __init__(self, cases: Sequence[Case], where: Device, dtype: str) -> None:
        self.cases, self.where, self.dtype = cases, where, dtype
        self.largest = max(cases, key=lambda case: case.product.m)
        self.copies = where.copies(self.largest, dtype)

    def draw(self, key: Array) -> tuple[dict[int, list[Array]], list[Array]]:
        """``(rows -> first operands, second operands)``; fewer rows are the first among more."""
        shapes_ = self.largest.product.stored
        keys = jax.random.split(key)
        a, b = (
            [*jax.random.normal(k, (self.copies, *of), jnp.float32).astype(self.dtype)]
            for k, of in zip(keys, shapes_, strict=True)
        )
        return {m: [x[:m] for x in a] for m in sorted({case.product.m for case in self.cases})}, b

    def prepare(self, b: list[Array]) -> list[Any]:
        return [self.where.prepared(self.largest, w) for w in b]

    def ours(self, case: Case, a: list[Array], b: list[Any]) -> list[Array]:
        one = jax.jit(lambda x, w: self.where.product(case, x, w, self.dtype))  # one kernel, however many copies
        return [one(x, w) for x, w in zip(a, b, strict=True)]

    def theirs(self, case: Case, a: list[Array], b: list[Array]) -> list[Array]:
        one = jax.jit(lambda x, w: dot(case, x, w, self.dtype))
        return [one(x, w) for x, w in zip(a, b, strict=True)]

    def leaves(self, a: list[Array], b: list[Any]) -> Array:
        return self.where.leaves(self.largest.product, a[0], b[0])

    def differing(self, case: Case, leaves: Array, ours: Array) -> Array:
        """How many values of ``ours`` have other bits than the tree over ``leaves``."""
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[item_bytes(self.dtype)]
        right = added(case, leaves[:, : ours.shape[0]], self.dtype)
        return jnp.sum(
            lax.bitcast_convert_type(right, unsigned) != lax.bitcast_convert_type(ours, unsigned), dtype=jnp.int32
        )

    # The abstract values that programs are compiled for.

    @cached_property
    def drawn(self) -> Any:
        return jax.eval_shape(self.draw, jax.eval_shape(_key))

    @cached_property
    def held(self) -> Any:
        return jax.eval_shape(self.prepare, self.drawn[1])

    @cached_property
    def leaf_values(self) -> Any:
        return jax.eval_shape(self.leaves, self.drawn[0][self.largest.product.m], self.held)

    def compile_draw(self) -> tuple[Any, Any]:
        drawing = jax.jit(self.draw).lower(jax.eval_shape(_key)).compile()
        return drawing, jax.jit(self.prepare).lower(self.drawn[1]).compile()

    def compile_leaves(self) -> Any:
        return jax.jit(self.leaves).lower(self.drawn[0][self.largest.product.m], self.held).compile()

    def compile_ours(self, case: Case) -> tuple[Any, Any]:
        a = self.drawn[0][case.product.m]
        lowered = jax.jit(lambda a, b: self.ours(case, a, b)).lower(a, self.held)
        ours = lowered.compile(self.where.options(baseline=False))
        result = jax.ShapeDtypeStruct(case.product.result, jnp.dtype(self.dtype))
        return ours, jax.jit(lambda x, y: self.differing(case, x, y)).lower(self.leaf_values, result).compile()

    def lower_theirs(self, case: Case) -> Any:
        a = self.drawn[0][case.product.m]
        return jax.jit(lambda a, b: self.theirs(case, a, b)).lower(a, self.drawn[1])


def _key() -> Array:
    return jax.random.key(20251117, impl="rbg")


def measure(
    cases: Sequence[Case],
    where: Device,
    *,
    dtype: str = "bfloat16",
    repeat: int | None = None,
    limit_seconds: float | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Iterator[dict[str, Any]]:
    """A row per case, as soon as it is known; what one is, :func:`row` says.

    A case that fails gives a row with ``error``, and the others go on. After ``limit_seconds`` no further case begins.
    """
    item_bytes(dtype)
    start, done, common = time.monotonic(), 0, surroundings(where, dtype)
    groups = [_Group(list(some), where, dtype) for _, some in groupby(cases, key=lambda case: case.group)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            plans = [_submit(pool, group) for group in groups]
            if where.alone:
                wait([future for plan in plans for future in plan.values()], timeout=limit_seconds)
            for group, plan in zip(groups, plans, strict=True):
                operands: Any = None
                theirs: dict[int, Any] = {}
                for case in group.cases:
                    progress(done, len(cases), f"{case.product} {case.tree}")
                    if limit_seconds is not None and time.monotonic() - start > limit_seconds:
                        return
                    try:
                        if operands is None:
                            operands = _operands(plan)
                        m = case.product.m
                        if m not in theirs:
                            theirs[m] = plan[f"theirs {m}"].result().compile(where.options(baseline=True))
                        found = _measured(group, case, plan[case].result(), theirs[m], operands, repeat)
                    except Exception as error:  # one shape that fails must not hide the others
                        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
                    done += 1
                    yield {**row(case, group.copies, dtype), **found, **common}
                plan.clear()
            progress(done, len(cases), "done")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, group: _Group) -> dict[Any, Future[Any]]:
    """Everything that a group compiles, on its way."""
    plan: dict[Any, Future[Any]] = {
        "draw": pool.submit(group.compile_draw),
        "leaves": pool.submit(group.compile_leaves),
    }
    for case in group.cases:
        plan[case] = pool.submit(group.compile_ours, case)
        if (baseline := f"theirs {case.product.m}") not in plan:
            plan[baseline] = pool.submit(group.lower_theirs, case)
    return plan


def _operands(plan: dict[Any, Future[Any]]) -> tuple[Any, Any, Any, Any]:
    draw, prepare = plan["draw"].result()
    a, b = draw(_key())
    held = prepare(b)
    return a, b, held, plan["leaves"].result()(a[max(a)], held)


def _measured(
    group: _Group, case: Case, compiled: tuple[Any, Any], theirs: Any, operands: Any, repeat: int | None
) -> dict[str, Any]:
    """The part of a row that is measured."""
    (a, b, held, leaves), (ours, differing), m = operands, compiled, case.product.m
    different = int(differing(leaves, ours(a[m], held)[0]))
    programs = {"baseline": Run(theirs, (a[m], b)), "ours": Run(ours, (a[m], held))}
    measured = group.where.time(programs, repeat or _REPEATS[case.suite])
    of = case.product
    found: dict[str, Any] = {}
    for name, (milliseconds, kernels) in measured.items():
        each = [1e3 * taken / group.copies for taken in milliseconds]
        low, median, high = quartiles(each)
        found[f"{name}_us"] = round(median, 3)
        found[f"{name}_spread_us"] = [round(low, 3), round(high, 3)]
        found[f"{name}_tflops"] = round(of.shape.flops(of.m) / median / 1e6, 3)
        found[f"{name}_gbs"] = round(of.shape.bytes(of.m, group.dtype) / median / 1e3, 2)
        found[f"{name}_kernels"] = kernels
        found[f"{name}_repeats"] = len(each)
    found["ratio"] = round(found["baseline_us"] / found["ours_us"], 4)
    found["bits"] = "equal" if not different else different / math.prod(of.result)
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of a single value, that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def row(case: Case, copies: int, dtype: str) -> dict[str, Any]:
    """What identifies a row: the case, its sizes, and how many pairs of operands took turns.

    ``m`` and ``n`` are the result's, ``k`` is contracted, whichever the direction. Measured rows add, for ``ours`` and
    ``baseline``: ``_us`` (median), ``_spread_us`` (quartiles), ``_tflops``, ``_gbs``, ``_kernels`` and ``_repeats``; and
    ``ratio`` (baseline over ours: more is faster), ``bits`` (``equal``, or the share that differs), and
    :func:`surroundings`.
    """
    of = case.product
    return {
        "suite": case.suite,
        "model": of.shape.model,
        "product": of.shape.name,
        "tp": of.shape.tp,
        "m": of.result[0],
        "n": of.result[1],
        "k": of.contraction,
        "tokens": of.m,
        "leaves": of.leaves,
        "tree": case.tree,
        "dtype": dtype,
        "copies": copies,
    }


def surroundings(where: Device, dtype: str) -> dict[str, Any]:
    """Device, versions, commit and date, as every row has them."""
    version = str(getattr(jax.devices()[0].client, "platform_version", ""))
    cuda = re.search(r"cuda (\d+)", version)
    return {
        "baseline": where.baseline,
        "timer": where.timer,
        "device": where.name,
        "jax": jax.__version__,
        "cuda": f"{int(cuda[1]) // 1000}.{int(cuda[1]) % 1000 // 10}" if cuda else None,
        "driver": _driver() if where.backend == "gpu" else None,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _driver() -> str | None:
    try:
        found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except OSError:
        return None
    return found.splitlines()[0] if found else None


def _commit() -> str:
    """Of the checkout that this package runs from; the package's version if it is installed."""
    from tbik_jax import __version__

    root = Path(__file__).resolve().parents[1]
    try:
        found = _output("git", "-C", str(root), "describe", "--always", "--dirty") if (root / ".git").exists() else ""
    except OSError:
        found = ""
    return found or f"tbik-jax {__version__}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@dataclass(frozen=True)
class Summary:
    """Of the rows of one suite with one number of tokens; or of all of them, with ``tokens`` None."""

    suite: str
    tokens: int | None
    rows: int
    geometric_mean: float
    smallest: float
    worst: str
    bits_equal: int


def summaries(rows: Iterable[dict[str, Any]]) -> list[Summary]:
    """Per suite and number of tokens, and per suite; rows with errors do not count."""
    sound = [row for row in rows if "error" not in row]
    found = []
    for suite in dict.fromkeys(row["suite"] for row in sound):
        of_suite = [row for row in sound if row["suite"] == suite]
        tokens = sorted({row["tokens"] for row in of_suite})
        for m in [*tokens, None] if len(tokens) > 1 else [None]:
            some = [row for row in of_suite if m is None or row["tokens"] == m]
            worst = min(some, key=lambda row: row["ratio"])
            label = f"{worst['model']} {worst['product']} tp{worst['tp']}, {worst['leaves']} leaves {worst['tree']}"
            equal = sum(row["bits"] == "equal" for row in some)
            mean = geometric_mean([row["ratio"] for row in some])
            found.append(Summary(suite, m, len(some), mean, worst["ratio"], label, equal))
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that a ratio and its inverse agree on."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))
