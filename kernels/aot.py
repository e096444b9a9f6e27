"""What the compiler makes of a Mosaic GPU kernel, for an H100, on a machine that has none. A developer's tool.

    python -m tbik_jax.kernels.aot --list
    python -m tbik_jax.kernels.aot 'forward/qwen3-8b/down/tp1/*'      # every registered case that fits a pattern
    python -m tbik_jax.kernels.aot 'weight*/qwen3-8b/*' --folder dump # PTX, SASS and the reports of ptxas stay there
    python -m tbik_jax.kernels.aot 'stage/*'                          # norms, rotations, SwiGLU, log-sum-exp

From Python, in a fresh process (the first call starts JAX on the CPU, without asking for a GPU):

    from tbik_jax.kernels import aot

    for kernel in aot.compiled(f, ((8192, 1, 4096), "bfloat16"), ((4096, 1, 4096), "bfloat16")):
        kernel.registers, kernel.spilled, kernel.wgmma, kernel.serialised, kernel.contractible, kernel.shared
    aot.show({"my kernel": kernels})    # the table of the command line

Needs jax with its CUDA plugin (``jax[cuda13]``) and ptxas; SASS needs ``pip install nvidia-cuda-nvdisasm`` besides. ``f``
is traced with the CPU as the default backend; what it may ask for is ``jax.sharding.get_abstract_mesh().abstract_device``,
which is the H100.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tbik_jax import shapes
from tbik_jax._console import err, out
from tbik_jax.tree import Tree

#: What XLA wants to know of a device that it does not see: an H100 SXM, as XLA prints it on one.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_SKIP_CUPTI = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"  # the plugin otherwise wants the profiler of a driver that is not here
_DUMP = "MOSAIC_GPU_DUMP_TO"
_lock = threading.Lock()  # the folder of the dump is an environment variable: one compilation at a time

Shape = tuple[Sequence[int], Any]


class UnavailableError(RuntimeError):
    """This environment cannot compile for an H100; the message says what is missing."""


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled.

    Attributes:
        name: Its entry point.
        threads: Per block.
        registers: Per thread, at the start; ``setmaxnreg`` moves them between warpgroups later.
        spill_stores: Bytes; with ``spill_loads`` and ``stack``, zero in a good kernel.
        spill_loads: Bytes.
        stack: Bytes of the stack frame.
        shared: Bytes of shared memory, static and dynamic; None if it is not a constant of the program.
        wgmma: Tensor-core instructions in the PTX.
        messages: What ptxas says beyond its statistics, for example that it inserted a wait.
        contractible: PTX lines that add a product of the same kernel, so that ptxas may round once instead of twice.
        fma: Fused multiply-adds that the PTX asks for.
        ffma: Fused multiply-adds in the SASS; None without nvdisasm.
        hgmma: Tensor-core instructions in the SASS; None without nvdisasm.
        ptx: The text.
        sass: The text; None without nvdisasm.
    """

    name: str
    threads: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int | None
    wgmma: int
    messages: tuple[str, ...]
    contractible: tuple[str, ...]
    fma: int
    ffma: int | None
    hgmma: int | None
    ptx: str = field(repr=False)
    sass: str | None = field(repr=False)

    @property
    def spilled(self) -> int:
        """Bytes of spills and of stack."""
        return self.spill_stores + self.spill_loads + self.stack

    @property
    def serialised(self) -> tuple[str, ...]:
        """The messages that say that tensor-core instructions wait for each other."""
        return tuple(m for m in self.messages if re.search(r"serialized|warpgroup\.wait is injected", m))


def compiled(
    f: Callable[..., Any], *arguments: Shape | jax.ShapeDtypeStruct, folder: Path | None = None
) -> list[Kernel]:
    """The Mosaic GPU kernels of ``jit(f)``, compiled for one H100.

    Args:
        f: Takes arrays, returns arrays.
        arguments: ``(shape, dtype)`` of each.
        folder: Where PTX, SASS and reports stay; otherwise they are read and deleted.

    Raises:
        UnavailableError: no CUDA plugin, no ptxas, a JAX that started without this module, or nothing was dumped.
    """
    mesh = jax.sharding.Mesh(np.array([_device()]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = [(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a for a in arguments]
    shapes = [jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding) for shape, dtype in given]
    with _dump(folder) as dump, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(f, out_shardings=sharding).lower(*shapes).compile()
        kernels = [_read(ptx) for ptx in sorted(dump.glob("*.ptx"))]
        for log in dump.glob("*.mlir-passes.log"):  # tens of megabytes that nobody reads
            log.unlink()
    if not kernels:
        raise UnavailableError(
            "aot: no kernel was compiled. Either the function has no Mosaic GPU kernel, or a compilation cache answered: "
            "unset JAX_COMPILATION_CACHE_DIR"
        )
    return kernels


def _device() -> Any:
    """One H100 that is not there."""
    from jax.experimental import topologies

    _need_ptxas()
    os.environ.setdefault(_SKIP_CUPTI, "1")
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=_H100).devices[0]
    except (NotImplementedError, RuntimeError) as error:
        raise UnavailableError(
            f"aot: JAX {jax.__version__} has no CUDA plugin that compiles without a GPU here ({error}). Install "
            f"jax[cuda13], and call this before JAX starts, or start it with {_SKIP_CUPTI}=1"
        ) from error


def _need_ptxas() -> None:
    wheels = [path for entry in sys.path for path in Path(entry or ".").glob("nvidia/*/bin/ptxas")]
    if shutil.which("ptxas") is None and not any(os.access(path, os.X_OK) for path in wheels):
        raise UnavailableError(
            "aot: there is no ptxas on the PATH; it comes with CUDA, and with pip install nvidia-cuda-nvcc"
        )


@contextmanager
def _dump(folder: Path | None) -> Iterator[Path]:
    """Mosaic writes what it compiles in a folder of its own meanwhile."""
    with _lock, tempfile.TemporaryDirectory() as temporary:
        before = os.environ.get(_DUMP)
        os.environ[_DUMP] = temporary
        try:
            yield Path(temporary)
        finally:
            if before is None:
                del os.environ[_DUMP]
            else:
                os.environ[_DUMP] = before
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                for path in Path(temporary).iterdir():
                    shutil.copy(path, folder)


def _read(ptx: Path) -> Kernel:
    """The kernel whose PTX this is, with what lies beside it."""
    text = ptx.read_text(encoding="utf-8")
    report_file = ptx.with_suffix(".ptxas")
    if not report_file.exists():
        raise UnavailableError(f"aot: {ptx.name} has no report of ptxas beside it")
    report = report_file.read_text(encoding="utf-8")
    registers = _number(r"Used (\d+) registers", report)
    if registers is None:
        raise UnavailableError(f"aot: the report of ptxas on {ptx.name} names no registers:\n{report}")
    listings = [path for suffix in (".sass", ".sass_ctrl") if (path := ptx.with_suffix(suffix)).exists()]
    sass = listings[0].read_text(encoding="utf-8") if listings else None
    launch = ptx.with_suffix(".before_layout_inference.txt")
    dynamic = _dynamic_shared(launch.read_text(encoding="utf-8")) if launch.exists() else None
    static = _number(r"(\d+) bytes smem", report) or 0
    entry = re.search(r"\.entry\s+(\w+)", text)
    return Kernel(
        name=entry[1] if entry else ptx.stem,
        threads=_number(r"\.maxntid\s+(\d+)", text) or 0,
        registers=registers,
        spill_stores=_number(r"(\d+) bytes spill stores", report) or 0,
        spill_loads=_number(r"(\d+) bytes spill loads", report) or 0,
        stack=_number(r"(\d+) bytes stack frame", report) or 0,
        shared=None if dynamic is None else static + dynamic,
        wgmma=len(re.findall(r"\bwgmma\.mma_async", text)),
        messages=messages(report),
        contractible=contractible(text),
        fma=len(re.findall(r"\bfma\.\w+\.(?:ftz\.)?f32", text)),
        ffma=None if sass is None else len(re.findall(r"\bFFMA", sass)),
        hgmma=None if sass is None else len(re.findall(r"\bHGMMA", sass)),
        ptx=text,
        sass=sass,
    )


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


def _dynamic_shared(mlir: str) -> int | None:
    name = re.search(r"dynamic_shared_memory_size (%\w+)", mlir)
    return _number(rf"{re.escape(name[1])} = arith\.constant (\d+)", mlir) if name else 0


def messages(report: str) -> tuple[str, ...]:
    """The lines of a report of ptxas that carry a message number, or are warnings or errors."""
    lines = (line.strip() for line in report.splitlines())
    found = [line for line in lines if re.search(r"\(C\d+\)|^ptxas (?:warning|error)", line)]
    return tuple(dict.fromkeys(re.sub(r"^ptxas \w+\s*:\s*", "", line) for line in found))


def contractible(ptx: str) -> tuple[str, ...]:
    """The f32 additions that ptxas may fuse with the product that they add.

    An addition that names its rounding (``add.rn``) is never fused. Products are followed through moves and selections,
    in any order of the lines, since a loop adds below what it multiplies above.
    """
    found: list[str] = []
    for body in re.split(r"^\s*(?:\.visible |\.weak |\.extern )*\.(?:entry|func)\b", ptx, flags=re.MULTILINE)[1:]:
        instructions = [i for i in map(_instruction, body.splitlines()) if i]
        products = {to for op, targets, _, _ in instructions if _is_product(op) for to in targets}
        known = -1
        while known != len(products):
            known = len(products)
            for op, targets, sources, _ in instructions:
                if op.startswith(("mov.", "selp.", "neg.", "abs.")) and products & sources:
                    products |= targets
        additions = ("add.f32", "add.ftz.f32", "sub.f32", "sub.ftz.f32")
        found += [line for op, _, sources, line in instructions if op in additions and products & sources]
    return tuple(found)


def _is_product(op: str) -> bool:
    return op in ("mul.f32", "mul.ftz.f32", "mul.rn.f32", "mul.rn.ftz.f32")


def _instruction(line: str) -> tuple[str, set[str], set[str], str] | None:
    """``(operation, registers written, registers read, line)`` of a line of PTX that has registers."""
    line = line.strip()
    match = re.match(r"(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+(\{[^}]*\}|%\w+)\s*,\s*(.*);", line)
    if match is None:
        return None
    op, targets, sources = match.groups()
    return op, set(re.findall(r"%\w+", targets)), set(re.findall(r"%\w+", sources)), line


Case = tuple[Callable[..., Any], tuple[Shape, ...]]


def cases() -> dict[str, Callable[[], Case]]:
    """Name to the function that is compiled under it, and its arguments; built when asked for.

    The products of the catalogue, ``direction/model/product/tp/m/tree``; attention, ``attention/kernel/dtype/head_dim/how the
    cache lies``; the other stages of 8192 tokens, ``stage/name/width``.
    """
    found: dict[str, Callable[[], Case]] = {}
    for shape in shapes.shapes():
        cut = 8 // shape.tp
        for direction, leaves, sizes in (
            ("forward", shape.leaves, (1, 8, 16, 64, 128, 1024, 8192)),
            ("weight-gradient", 8, (8192,)),
            ("input-gradient", cut if shape.parallel == "column" else 1, (8192,)),
        ):
            for m in sizes:
                for tree in ("balanced", "chain") if leaves > 2 else ("balanced",):
                    name = f"{direction}/{shape.model}/{shape.name}/tp{shape.tp}/m{m}/{tree}"
                    found[name] = functools.partial(_hopper, direction, shape, m, leaves, tree)
    for name, widths in _STAGES.items():
        for width in widths:
            found[f"stage/{name}/{width}"] = functools.partial(_stage, name, width)
    for dtype, dim in (("bfloat16", 128), ("bfloat16", 64), ("float16", 128), ("float16", 64)):
        for page in (0, 16, 128, 256):
            how = f"pages of {page}" if page else "contiguous"
            for kernel, queries in (("prefill", 2048), ("decode", 1)):
                found[f"attention/{kernel}/{dtype}/{dim}/{how}"] = functools.partial(
                    _attention, queries, dtype, dim, page
                )
    return found


_WIDTHS = (64, 128, 576, 4096, 5120)
_STAGES = {
    "rms-norm": _WIDTHS,
    "add-rms-norm": _WIDTHS,
    "rms-norm-gradients": _WIDTHS,
    "rope": (64, 128),
    "norm-rope": (64, 128, 256),
    "norm-rope-gradients": (64, 128, 256),
    "norm-rope-gradients-by-leaf": (128,),
    "few-norm-gradients": (128, 4096),
    "add": (4096,),
    "swiglu": (12288,),
    "swiglu-gradients": (12288,),
    "log-sum-exp": (16032, 18992, 4001),
    "log-sum-exp-gradient": (4096, 151936),
    "cross-entropy-gradient": (4096, 151936, 18993),
    "log-softmax-gradient": (4096, 151936),
}


def _stage(name: str, width: int) -> Case:
    from tbik_jax.kernels.hopper import maps, norms, norms_backward, softmax, sums

    def rms_norm_gradients(x: jax.Array, dy: jax.Array, beside: jax.Array, scale: jax.Array) -> Any:
        return norms_backward.rms_norm_gradients(x, scale, dy, 1e-6, beside)

    def norm_rope(q: jax.Array, k: jax.Array, scale: jax.Array, cos: jax.Array, sin: jax.Array) -> Any:
        return norms.rms_norm_rope((q, k), (scale, scale), cos, sin, 1e-6)

    def norm_rope_gradients(leaves: tuple[int, int] | None, *arrays: jax.Array) -> Any:
        q, k, dq, dk, scale, cos, sin = arrays
        return norms_backward.rms_norm_rope_gradients((q, k), (scale, scale), (dq, dk), cos, sin, 1e-6, leaves)

    def few_gradients(x: jax.Array, dy: jax.Array, scale: jax.Array) -> Any:
        return norms_backward.rms_norm_gradients(x[:64], scale, dy[:64], 1e-6)

    def log_softmax_gradient(y: jax.Array, dy: jax.Array, total: jax.Array) -> jax.Array:
        return softmax.log_softmax_gradient(y, dy, total, dtype=y.dtype)

    logits, of_rows, label = ((1024, width), "float32"), ((1024,), "float32"), ((1024,), "int32")
    rows: Shape = ((8192, width), "bfloat16")
    scale: Shape = ((width,), "bfloat16")
    heads, kv_heads = ((8192, 32, width), "bfloat16"), ((8192, 8, width), "bfloat16")
    angles = (8192, width // 2), "float32"
    backward = (heads, kv_heads, heads, kv_heads, scale, angles, angles)
    stages: dict[str, Case] = {
        "rms-norm": (lambda x, scale: norms.rms_norm(x, scale, 1e-6)[1], (rows, scale)),
        "add-rms-norm": (lambda x, y, scale: norms.rms_norm(x, scale, 1e-6, y), (rows, rows, scale)),
        "rms-norm-gradients": (rms_norm_gradients, (rows, rows, rows, scale)),
        "few-norm-gradients": (few_gradients, (rows, rows, scale)),
        "rope": (maps.rope, (heads, angles, angles)),
        "norm-rope": (norm_rope, (heads, kv_heads, scale, angles, angles)),
        "norm-rope-gradients": (functools.partial(norm_rope_gradients, None), backward),
        "norm-rope-gradients-by-leaf": (functools.partial(norm_rope_gradients, (8, 8)), backward),
        "add": (maps.add, (rows, rows)),
        "swiglu": (maps.swiglu, (rows, rows)),
        "swiglu-gradients": (maps.swiglu_gradients, (rows, rows, rows)),
        "log-sum-exp": (sums.leaf_exp_sums, (((1024, 8, width), "float32"),)),
        "log-sum-exp-gradient": (softmax.log_sum_exp_gradient, (logits, of_rows, of_rows)),
        "cross-entropy-gradient": (softmax.cross_entropy_gradient, (logits, of_rows, of_rows, label, label)),
        "log-softmax-gradient": (log_softmax_gradient, (logits, logits, of_rows)),
    }
    return stages[name]


def _attention(queries: int, dtype: str, dim: int, page: int) -> Case:
    from tbik_jax.kernels.attention import hopper

    batch, heads, kv_heads, length = 4, 32, 8, 4096
    pages = batch * length // page if page else batch

    def f(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *table: jax.Array) -> jax.Array:
        return hopper.attention(dim**-0.5, q, k, v, positions, None, *table)

    cache = (pages, kv_heads, page or length, dim), dtype
    table = [((batch, length // page), "int32")] if page else []
    return f, (((batch, queries, heads, dim), dtype), cache, cache, ((batch, queries), "int32"), *table)


def _hopper(direction: str, shape: shapes.ProductShape, m: int, leaves: int, tree: str) -> Case:
    from tbik_jax.kernels.matmul import hopper

    product = shapes.Product(direction, shape, m, leaves)
    root = getattr(Tree, tree)(leaves).root

    def f(a: jax.Array, b: jax.Array) -> jax.Array:
        return hopper.product(product.spec, a, b, (root,), dtype=a.dtype)

    a, b = product.by_leaf
    return f, ((a, "bfloat16"), (b, "bfloat16"))


def show(kernels: Mapping[str, Sequence[Kernel]], console: Console = out) -> None:
    """The table of some cases, and under it what ptxas says of them."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("case", overflow="fold")
    for name in (
        "threads",
        "registers",
        "spilled\nbytes",
        "shared\nbytes",
        "wgmma",
        "serial-\nised",
        "contrac-\ntible",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("FFMA\n(asked for)", justify="right", no_wrap=True)
    every = [(case, kernel) for case, several in kernels.items() for kernel in several]
    for case, k in every:
        table.add_row(
            case if len(kernels[case]) == 1 else f"{case}: {k.name}",
            *map(str, (k.threads, k.registers, k.spilled, "?" if k.shared is None else k.shared, k.wgmma)),
            str(len(k.serialised)),
            str(len(k.contractible)),
            f"{'-' if k.ffma is None else k.ffma} ({k.fma})",
            style="bold red" if k.serialised or k.contractible else "yellow" if k.spilled else "",
        )
    console.print(table)
    for case, k in every:
        for line in (*k.messages, *k.contractible[:5]):
            console.print(f"{case}: {line}", highlight=False, markup=False, soft_wrap=True)
    if any(k.sass is None for _, k in every):
        console.print("No SASS: there is no nvdisasm beside JAX; pip install nvidia-cuda-nvdisasm", highlight=False)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Compile registered kernels for an H100, with or without one, and show what came out.")
def main(
    patterns: Annotated[list[str] | None, typer.Argument(help="Of the names of cases, like 'forward/*'.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Name the cases and stop.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Keep PTX, SASS and reports here, a folder per case.")] = None,
) -> None:
    """Exit status 1 if a case spills, is serialised or can be contracted; 2 if it cannot be compiled."""
    known = cases()
    if list_cases:
        out.print("\n".join(known), highlight=False)
        return
    wanted = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or [])]
    if not wanted:
        asked = (
            f"no case fits {', '.join(patterns)}" if patterns else "name a case, or a pattern like 'forward/qwen3-8b/*'"
        )
        err.print(f"error: {asked}; --list names them", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2)
    jax.config.update("jax_enable_compilation_cache", False)
    results: dict[str, list[Kernel]] = {}
    failed = False
    for name in wanted:
        try:
            f, arguments = known[name]()
            results[name] = compiled(f, *arguments, folder=folder / name if folder else None)
        except UnavailableError as error:
            err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except Exception as error:  # a kernel that does not compile must not hide the others
            failed = True
            err.print(f"error: {name}: {type(error).__name__}: {error}", highlight=False, markup=False, soft_wrap=True)
    if results:
        show(results)
    if failed:
        raise typer.Exit(2)
    if any(k.serialised or k.contractible or k.spilled for several in results.values() for k in several):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
