"""Products on Hopper GPUs. What needs the card says so and is skipped elsewhere; the rest is plain Python, or interpreted."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, Tree, emulate
from tbik_jax.dense import column_parallel, make_dot_general, row_parallel, swiglu
from tbik_jax.kernels import backend, matmul
from tbik_jax.kernels.attention.unfused_backward import attention_backward
from tbik_jax.kernels.matmul import hopper
from tbik_jax.kernels.matmul.hopper import settling, split, tuning
from tbik_jax.kernels.matmul.hopper.large import Operand, Problem, Tiles
from tbik_jax.kernels.matmul.hopper.small import SmallTiles
from tbik_jax.program import program
from tbik_jax.shapes import shapes
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import Node, schedule
from tests.meshes import by_slot, columns_by_slot, columns_from_slots, from_slots


def is_hopper() -> bool:
    with contextlib.suppress(NotImplementedError):
        return backend.family() == "sm90"
    return False


on_the_card = pytest.mark.skipif(
    not is_hopper(), reason=f"needs a Hopper GPU; the default backend is {jax.default_backend()}"
)
interpreted = pytest.mark.skipif(
    jax.default_backend() != "cpu" or tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12),
    reason=f"Mosaic GPU's interpreter runs these kernels on CPUs from JAX 0.12 on; this is {jax.__version__} on "
    f"{jax.default_backend()}",
)


def leaf_nodes(leaves: int) -> tuple[Node, ...]:
    return tuple(Node(i, i + 1) for i in range(leaves))


# Programs: trees as kernels walk them ----------------------------------------------------------------------------------


@given(st.integers(1, 64), st.lists(st.integers(2, 9), min_size=1, max_size=3), st.data())
def test_a_program_performs_the_additions_of_its_nodes(leaves, arities, data):
    tree = Tree(leaves, tuple(arities))
    start = data.draw(st.integers(0, leaves - 1))
    stop = data.draw(st.integers(start + 1, leaves))
    nodes = tree.nodes(start, stop)
    steps = program(nodes)
    got = steps.run(lambda i: str(i + start), lambda a, b: f"({a} + {b})")
    assert got == [str(node) for node in nodes]
    for step in steps.steps:
        assert list(step.pops) == sorted(set(step.pops))
        # Kernels keep in registers only what never left them.
        assert step.push != 0 or set(step.pops) <= {0}


def _moved(node: Node, by: int) -> Node:
    if node.left is None or node.right is None:
        return Node(node.start - by, node.stop - by)
    return Node(node.start - by, node.stop - by, _moved(node.left, by), _moved(node.right, by))


@pytest.mark.parametrize("arities, storages", [((8,), 1), ((2,), 3), ((4, 2), 2), ((2, 4), 2)])
def test_how_many_sums_wait(arities, storages):
    steps = program([Tree(8, arities).root])
    assert steps.storages == storages
    assert steps.is_chain == (arities == (8,))


def test_nodes_out_of_order():
    with pytest.raises(ValueError, match="does not follow"):
        program([Node(0, 1), Node(2, 3)])


# f32 in pieces -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), min_size=1, max_size=9)
)
def test_pieces_sum_to_the_number(values):
    x = np.array(values, np.float32)
    x = x[(np.abs(x) > 1e-30) | (x == 0)]  # below, the last piece is subnormal
    pieces = np.asarray(split.left(jnp.asarray(x)[:, None], axis=1), np.float64)
    np.testing.assert_array_equal(pieces[:, 7] + pieces[:, 5] + pieces[:, 2], x.astype(np.float64))


def test_products_of_pieces(rng):
    x, w = rng.standard_normal((2, 50, 40), np.float32)
    left, right = (np.asarray(f(jnp.asarray(v), axis=1), np.float64) for f, v in ((split.left, x), (split.right, w)))
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    assert np.abs(left @ right.T - want).max() < 2**-28 * (np.abs(x) @ np.abs(w).T).max()


def test_infinities_stay():
    x = jnp.array([[jnp.inf, -jnp.inf, 3.4e38]], jnp.float32)
    pieces = np.asarray(split.left(x, axis=0), np.float32)
    np.testing.assert_array_equal(pieces[7], [np.inf, -np.inf, pieces[7][2]])
    np.testing.assert_array_equal(pieces[[2, 5]][:, :2], 0)
    assert np.isfinite(pieces[:, 2]).all()


# Tiles and errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arities", [(2,), (8,)])
@pytest.mark.parametrize("m", [1, 17, 64, 128, 129, 1024, 8192])
def test_tiles_exist_for_the_catalogue(m, arities):
    for layer in shapes():
        steps = program([Tree(layer.leaves, arities).root])
        k = layer.k // layer.leaves
        problem = Problem(
            m, layer.n, k, 1, Operand("mlk", "m"), Operand("nlk", "n"), "smn", jnp.bfloat16, jnp.bfloat16, steps
        )
        large = tuning.large_tiles(problem, 132)
        assert large.stages >= 2 and large.columns % 16 == 0
        if m <= tuning.SMALL_ROWS:
            small = tuning.small_tiles(problem, 132)
            assert small is None or (small.stages >= 2 and layer.leaves % small.split == 0)


@pytest.mark.parametrize(
    "spec, a, b, leaves, error, message",
    [
        ("mlk;nlk", (8, 1, 64), (8, 1, 64), 1, ValueError, "not of the form"),
        ("mlk,nlk->mn", (8, 2, 64), (8, 3, 64), 2, ValueError, "'l' is 2 in a and 3 in b"),
        ("mlk,nk->mn", (8, 2, 64), (8, 64), 2, ValueError, "is cut in leaves, the other is not"),
        ("mlk,nlk->mn", (8, 2, 64), (8, 2, 64), 3, ValueError, "do not cover the 2 leaves"),
        ("mlk,nlk->m", (8, 2, 64), (8, 2, 64), 2, ValueError, "the result is 'm'"),
        ("mkl,nlk->mn", (8, 64, 2), (8, 2, 64), 2, NotImplementedError, "the last dimension must be k, m or n"),
        ("mk,nk->mn", (0, 64), (8, 64), 1, ValueError, "no elements along 'm'"),
    ],
)
def test_errors_come_before_any_kernel(spec, a, b, leaves, error, message):
    with pytest.raises(error, match=message):
        hopper.product(spec, jnp.zeros(a, jnp.bfloat16), jnp.zeros(b, jnp.bfloat16), (Tree(leaves).root,))


def test_other_dtypes_are_refused():
    with pytest.raises(NotImplementedError, match=r"a is int8; supported are bfloat16, float16, float32"):
        hopper.product("mk,nk->mn", jnp.zeros((8, 64), jnp.int8), jnp.zeros((8, 64), jnp.int8), (Node(0, 1),))


class _Gpu:
    device_kind, compute_capability = "NVIDIA A100", "8.0"


def test_another_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [_Gpu()])
    with pytest.raises(NotImplementedError, match=r"'gpu' with NVIDIA A100 \(compute capability 8\.0\)"):
        backend.family()


def test_what_has_no_kernel_yet_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "family", lambda: "sm90")
    x, positions = jnp.ones((1, 1, 3, 8)), jnp.arange(3)[None]
    with pytest.raises(NotImplementedError, match=r"^attention_backward has no kernel in family 'sm90' yet"):
        attention_backward(*[x.swapaxes(1, 2)] * 2, x, x, positions=positions, scale=1.0, kv_block=128)


# What follows a leaf -------------------------------------------------------------------------------------------------


def perform(lines: list[str], registers: dict[str, np.float32], memory: dict[str, list[np.float32]]) -> None:
    """The PTX of `settling.written`, one thread."""
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    number, p = 0, False
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.endswith(":"):
            continue
        instruction, *operands = [part for part in re.split(r"[ ,;{}\[\]]+", line) if part]
        if instruction == "setp.ne.b32":
            p = bool(registers[operands[1]])
        elif instruction == "add.rn.f32":
            registers[operands[0]] = registers[operands[1]] + registers[operands[2]]
        elif instruction == "mov.b32":
            registers[operands[0]] = np.float32(-0.0) if operands[1] == "0x80000000" else registers[operands[1]]
        elif instruction == "ld.shared.v4.f32":
            registers |= zip(operands[:4], memory[operands[4]], strict=True)
        elif instruction == "st.shared.v4.f32":
            memory[operands[0]] = [registers[name] for name in operands[1:]]
        elif instruction == "bra.uni" or (instruction == "@!p" and not p):
            number = labels[operands[-1]]
        else:
            assert instruction == "@!p" and operands[0] == "bra.uni", line


@pytest.mark.invariance
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("sums", [1, 2])
@pytest.mark.parametrize("arities, leaves", [((2,), 8), ((2,), 16), ((4, 2), 8), ((3, 2), 7), ((2, 4), 9), ((2,), 2)])
def test_sums_settle_in_the_order_of_the_tree(rng, arities, leaves, sums, late):
    """The instructions themselves, leaf after leaf, for two nodes that follow each other."""
    first, second = (Tree(leaves, arities).root for _ in range(2))
    steps = program([first, _moved(second, -leaves)])
    size = 32
    values = (rng.standard_normal((2 * leaves, size)) * 10.0 ** rng.integers(-3, 4, (2 * leaves, 1))).astype(np.float32)
    total, leaf, other = ([f"{name}{e}" for e in range(size)] for name in "tlo")
    registers = dict.fromkeys([*total, *other], np.float32(-0.0))
    memory: dict[str, list[np.float32]] = {}
    stops = []
    for number in range(1, steps.storages):
        here, places = other if number < sums else None, [(".shared", f"m{number}+{i}") for i in range(size // 4)]
        stops.append(settling.Named(f"a{number}", f"b{number}", here, [] if here else places, late and not here))
    lines, found = settling.written(total, leaf, stops), []
    for index, step in enumerate(steps.steps):
        registers |= zip(leaf, values[index], strict=True)
        for number in range(1, steps.storages):
            registers |= {f"a{number}": number in step.pops, f"b{number}": step.push == number}
        perform(lines, registers, memory)
        stays = [registers[name] for name in total]
        if step.push is None:
            found.append(stays)
        elif late and step.push >= sums:
            memory |= {f"m{step.push}+{i}": stays[4 * i : 4 * i + 4] for i in range(size // 4)}
        else:
            continue
        registers |= dict.fromkeys(total, np.float32(-0.0))  # it leaves with the next leaf
    want = [first.evaluate(lambda i, at=at: values[at + i], np.add) for at in (0, leaves)]
    assert_bitwise_equal(np.array(found, np.float32), np.array(want))
    assert (np.array(found) != [values[at : at + leaves].sum(0, np.float32) for at in (0, leaves)]).any() or leaves == 2


# Interpreted ---------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.newest
@pytest.mark.parametrize(
    "tiles, leaves, arities, m, n",
    [
        (Tiles(64, 2), 1, (2,), 136, 80),
        (Tiles(64, 2), 3, (3,), 136, 80),
        (Tiles(64, 3, out_bytes=32, turns=True), 1, (2,), 136, 80),
        (Tiles(64, 3, out_bytes=32, turns=True), 2, (2,), 72, 96),
        (Tiles(64, 3, turns=True, end_pairs=True), 3, (3,), 136, 80),
    ],
)
def test_control_flow_in_the_interpreter(rng, monkeypatch, tiles, leaves, arities, m, n):
    """Ring, tiles and chain of the kernel for many rows. The CPU's dots have other bits than the GPU's, so: values."""
    monkeypatch.setattr(hopper, "_multiprocessors", lambda: 2)
    k = 328 if tiles.end_pairs else 136  # six steps, or three
    a = jnp.asarray(rng.standard_normal((m, leaves, k)), jnp.bfloat16)
    b = jnp.asarray(rng.standard_normal((n, leaves, k)), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode():
        got = hopper.product(
            "mlk,nlk->mn",
            a,
            b,
            (Tree(leaves, arities).root,),
            dtype=jnp.float32,
            tiles=tiles,
        )
    want = np.einsum("mlk,nlk->mn", np.asarray(a, np.float64), np.asarray(b, np.float64))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@interpreted
@pytest.mark.newest
@pytest.mark.parametrize("spans", [((0, 1), (1, 2), (2, 3)), ((0, 1), (1, 3)), ((0, 2), (2, 3))])
def test_nodes_of_many_tiles_in_the_interpreter(rng, monkeypatch, spans):
    """A result leaves while the next leaf runs: that of the same tile, of the next one, or none at the end."""
    monkeypatch.setattr(hopper, "_multiprocessors", lambda: 2)
    a, b = (jnp.asarray(rng.standard_normal((rows, 3, 72)), jnp.bfloat16) for rows in (200, 136))
    leaf = leaf_nodes(3)
    nodes = [leaf[i] if last - i == 1 else Node(i, last, leaf[i], leaf[i + 1]) for i, last in spans]
    with plgpu.force_gpu_interpret_mode():
        got = hopper.product("mlk,nlk->mn", a, b, nodes, dtype=jnp.float32, tiles=Tiles(64, 2, out_bytes=64))
    leaves = np.einsum("mlk,nlk->lmn", np.asarray(a, np.float64), np.asarray(b, np.float64))
    want = np.stack([leaves[first:last].sum(0) for first, last in spans])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


# On the card ----------------------------------------------------------------------------------------------------------

SPECS = [
    ("mlk,nlk->mn", (300, 8, 512), (448, 8, 512)),
    ("mlk,lnk->mn", (301, 3, 104), (3, 777, 104)),
    ("mk,nk->mn", (257, 4096), (769, 4096)),
    ("lkm,lkn->mn", (8, 129, 320), (8, 129, 448)),
    ("mlk,lkn->mn", (300, 8, 96), (8, 96, 576)),
    ("mk,bkn->mbn", (300, 448), (8, 448, 72)),
    ("lkm,lkbn->bmn", (4, 129, 448), (4, 129, 8, 72)),
    ("lkm,lkbn->bnm", (4, 129, 448), (4, 129, 8, 72)),
    ("mlk,nlk->nm", (130, 8, 96), (9, 8, 96)),
    ("mlk,nlk->mn", (65, 16, 64), (450, 16, 64)),
    ("mlk,nlk->mn", (200, 40, 64), (450, 40, 64)),
]


def operands(rng: Any, a: tuple[int, ...], b: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    x, y = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in (a, b))
    return x, y


def multiply(spec: str, nodes: Any, dtype: Any = jnp.float32, tiles: Any = None) -> Any:
    return jax.jit(partial(hopper.product, spec, nodes=tuple(nodes), dtype=dtype, tiles=tiles))


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 100, 300])
def test_parts_are_those_of_the_whole(rng, m):
    """Few rows: one kernel writes them apart. Many: a kernel each."""
    x, w = operands(rng, (m, 1, 320), (1, 1601, 320), "bfloat16")
    nodes = leaf_nodes(1)
    whole = multiply("mlk,lnk->mn", nodes)(x, w)
    for parts in ((1000, 600, 1), (1024, 577), (3, 8, 1590)):
        found = jax.jit(partial(hopper.products, "mlk,lnk->mn", nodes=nodes, parts=parts, dtype=jnp.float32))(x, w)
        assert_bitwise_equal(jnp.concatenate(found, axis=1), whole, str(parts))


@on_the_card
@pytest.mark.gpu
def test_slices_that_begin_anywhere(rng):
    """XLA would hand a kernel the part that begins at a multiple of 128 bytes, and Mosaic take it at 256 only."""
    x, w = operands(rng, (140, 1, 64), (301, 1, 64), "bfloat16")
    product = partial(hopper.product, "mlk,nlk->mn", nodes=leaf_nodes(1))
    whole = jax.jit(product)(x, w)
    for first in (1, 2, 3, 131):
        assert_bitwise_equal(jax.jit(lambda x, w, i=first: product(x[i:], w[i:]))(x, w), whole[first:, first:])


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("m, n, k", [(300, 1000, 320), (129, 8, 136), (1024, 1536, 512)])
def test_gating_in_the_kernel_is_the_stages_one_by_one(rng, m, n, k, dtype):
    x, w = operands(rng, (m, k), (1, 2 * n, k), dtype)
    x = x / 4  # sigmoids of every size
    assert hopper.is_gated(x, w)
    want = jax.jit(lambda x, w: swiglu(*matmul.parted_products(x[:, None], w, (n, n), dtype=x.dtype)))(x, w)
    assert_bitwise_equal(jax.jit(matmul.gated_products)(x, w), want)
    for tiles in (Tiles(256, 4, 2, out_bytes=64), Tiles(128, 3), Tiles(64, 4, out_bytes=32)):
        assert_bitwise_equal(jax.jit(partial(hopper.gated, tiles=tiles))(x, w), want, str(tiles))


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("spec, a, b", SPECS)
def test_every_layout_is_the_tree_over_leaf_products(rng, spec, a, b, dtype):
    x, y = operands(rng, a, b, dtype)
    first, second = spec.split("->")[0].split(",")
    leaves = dict(zip(first, a, strict=True)).get("l", 1)
    parts = np.asarray(multiply(spec, leaf_nodes(leaves))(x, y))
    parts = parts if leaves > 1 else parts[None]
    out = spec.split("->")[1]
    want = np.einsum(
        f"{first},{second}->{'l' if leaves > 1 else ''}{out}", np.asarray(x, np.float64), np.asarray(y, np.float64)
    ).reshape(parts.shape)
    assert np.linalg.norm(parts - want) < 1e-5 * np.linalg.norm(want)
    for arities in ((2,), (8,), (3, 2)):
        tree = Tree(leaves, arities)
        whole = tree.reduce(list(parts), np.add)
        assert_bitwise_equal(multiply(spec, [tree.root])(x, y), whole, f"{arities}")
        assert_bitwise_equal(
            multiply(spec, [tree.root], x.dtype)(x, y), whole.astype(x.dtype), f"{arities}, rounded once"
        )
        if leaves == 8:
            nodes = tree.nodes(0, 5) + tree.nodes(5, 8)
            assert_bitwise_equal(
                multiply(spec, nodes)(x, y),
                np.stack([node.evaluate(lambda i: parts[i], np.add) for node in nodes]),
                f"nodes of {arities}",
            )


@on_the_card
@pytest.mark.gpu
def test_cotangents_of_logits_are_rounded(rng):
    """To the operands' dtype, as if the products had been."""
    x, w = operands(rng, (37, 320), (8 * 50, 320), "bfloat16")
    dy = jnp.asarray(rng.standard_normal((37, 400), np.float32))

    def gradients(dtype: str) -> Any:
        f = partial(column_parallel, axis_name=None, contract=Contract(), dtype=dtype)
        return jax.jit(lambda x, w, dy: jax.vjp(f, x, w)[1](dy.astype(dtype)))(x, w, dy)

    assert_bitwise_equal(gradients("float32"), gradients("bfloat16"))


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arities", [(2,), (8,)])
def test_rows_and_columns_do_not_see_each_other(rng, arities, dtype):
    x, y = operands(rng, (8192, 8, 136), (1032, 8, 136), dtype)
    root = [Tree(8, arities).root]
    whole = np.asarray(multiply("mlk,nlk->mn", root, x.dtype)(x, y))
    for m in (1, 3, 17, 64, 128, 257, 1024):
        assert_bitwise_equal(multiply("mlk,nlk->mn", root, x.dtype)(x[:m], y), whole[:m], f"{m} rows")
    for m, n in itertools.product(
        (5, 70, 300), (1, 9, 17, 200)
    ):  # results narrower than a tile, or than one piece of it
        got = multiply("mlk,nlk->mn", root, x.dtype)(x[:m], y[3 : 3 + n])
        assert_bitwise_equal(got, whole[:m, 3 : 3 + n], f"{m} rows, {n} columns")


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("arities", [(2,), (8,), (4, 2)])
def test_tiles_and_runs_change_nothing(rng, arities):
    x, y = operands(rng, (128, 8, 192), (448, 8, 192), "bfloat16")
    root = [Tree(8, arities).root]
    want = multiply("mlk,nlk->mn", root)(x, y)
    assert_bitwise_equal(multiply("mlk,nlk->mn", root)(x, y), want, "again")
    for tiles in (
        Tiles(192, 3),
        Tiles(208, 4, turns=True),
        Tiles(208, 4, near=13, cluster=2, out_bytes=32),
        Tiles(128, 4, near=19, turns=True),
        Tiles(64, 3, cluster=2, band=2, turns=True),
        Tiles(48, 2, near=12),
        Tiles(128, 5, sums=2, near=14, out_bytes=64, turns=True),
        Tiles(96, 3, sums=2, cluster=2, out_bytes=32),
        Tiles(192, 4, near=8, turns=True, late_sums=True),
        Tiles(128, 5, sums=2, near=14, out_bytes=64, turns=True, late_sums=True),
        Tiles(64, 3, late_sums=True, near=5),
        SmallTiles(64, True, 64, 3, 8),
        SmallTiles(128, True, 64, 2, 4),
        SmallTiles(16, False, 128, 2, 2),
        SmallTiles(8, False, 64, 4, 1),
        SmallTiles(24, False, 64, 3, 2, rows=64),
    ):
        assert_bitwise_equal(multiply("mlk,nlk->mn", root, tiles=tiles)(x, y), want, str(tiles))


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("k", [256, 328, 512, 1536])
@pytest.mark.parametrize("arities", [(2,), (8,)])
def test_what_leaves_in_other_steps_changes_nothing(rng, arities, k):
    """Leaves of 4, 6, 8 and 24 steps: fewer than pieces, as many, more."""
    x, y = operands(rng, (384, 8, k), (1000, 8, k), "bfloat16")
    root = [Tree(8, arities).root]
    want = multiply("mlk,nlk->mn", root)(x, y)
    for pairs, late in itertools.product((False, True), repeat=2):
        change = {"turns": True, "end_pairs": pairs, "late_sums": late}
        got = multiply("mlk,nlk->mn", root, tiles=lambda tiles, change=change: replace(tiles, **change))(x, y)
        assert_bitwise_equal(got, want, str(change))


@on_the_card
@pytest.mark.gpu
def test_twin_the_vendor_library_sees_the_other_rows(rng):
    x, y = operands(rng, (8192, 4096), (4096, 4096), "bfloat16")
    dot = jax.jit(lambda x, y: lax.dot_general(x, y, (((1,), (1,)), ((), ()))))
    whole = bits(dot(x, y))
    assert any((bits(dot(x[:m], y)) != whole[:m]).any() for m in (1, 8, 17, 64, 128))


LEAVES = 8
CONTRACT = Contract(leaves=LEAVES)
column = partial(column_parallel, axis_name="tp", contract=CONTRACT, leaves=LEAVES)
row = partial(row_parallel, axis_name="tp", contract=CONTRACT, leaves=LEAVES)


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("m, dtype", [(1, "bfloat16"), (65, "bfloat16"), (300, "bfloat16"), (65, "float32")])
@pytest.mark.parametrize("tree", [(2,), (8,)])
def test_one_card_computes_what_a_mesh_would(rng, m, dtype, tree):
    """An MLP of 2, 3, 4 and 8 ranks, forward and backward, equal to one rank in every bit."""
    dim, width = 136, 72
    contract = Contract(leaves=LEAVES, tree=tree)
    column = partial(column_parallel, axis_name="tp", contract=contract, leaves=LEAVES)
    row = partial(row_parallel, axis_name="tp", contract=contract, leaves=LEAVES)
    x, dy = (rng.standard_normal((m, dim)).astype(dtype) for _ in range(2))
    gate, up = (rng.standard_normal((LEAVES, width, dim)).astype(dtype) for _ in range(2))
    down = rng.standard_normal((LEAVES, dim, width)).astype(dtype)

    def run(dy, x, gate, up, down):
        y, pull = jax.vjp(lambda *v: row(swiglu(column(v[0], v[1]), column(v[0], v[2])), v[3]), x, gate, up, down)
        return y, pull(dy)

    whole, cut = P(), P("tp")
    results = {}
    for ranks in (1, 2, 3, 4, 8):
        plan = schedule(contract.tree_over(LEAVES), ranks)
        emulated = emulate(
            run, ranks=ranks, in_specs=(whole, whole, cut, cut, cut), out_specs=(whole, (whole, cut, cut, cut))
        )
        y, (dx, *dw) = emulated(dy, x, *(by_slot(w, plan) for w in (gate, up, down)))
        results[ranks] = y, dx, [from_slots(w, plan) for w in dw]
        assert_bitwise_equal(results[ranks], results[1], f"{ranks} ranks")
    # And no axis at all: kernels that round inside.
    y, (dx, *dw) = jax.jit(
        lambda dy, *v: (lambda y, pull: (y, pull(dy)))(
            *jax.vjp(
                lambda x, gate, up, down: row_parallel(
                    swiglu(
                        column_parallel(x, gate, axis_name=None, contract=contract),
                        column_parallel(x, up, axis_name=None, contract=contract),
                    ),
                    down,
                    axis_name=None,
                    contract=contract,
                ),
                *v,
            )
        )
    )(dy, x, gate, up, down)
    assert_bitwise_equal((y, dx, dw), results[1], "no axis")


@on_the_card
@pytest.mark.gpu
def test_projections_around_attention(rng):
    """Heads of a column-parallel product, one by one per rank, and the row-parallel product behind them."""
    x = rng.standard_normal((33, 264)).astype("bfloat16")
    qkv, out = (rng.standard_normal(shape).astype("bfloat16") for shape in ((LEAVES, 96, 264), (LEAVES, 264, 96)))
    results = []
    for ranks in (1, 2, 3, 4, 8):
        plan = schedule(CONTRACT.tree_over(LEAVES), ranks)
        heads = emulate(column, ranks=ranks, in_specs=(P(), P("tp")), out_specs=P(None, "tp"))
        y = columns_from_slots(heads(x, by_slot(qkv, plan)), plan)
        back = emulate(row, ranks=ranks, in_specs=(P(None, "tp"), P("tp")), out_specs=P())
        results.append((y, back(columns_by_slot(y, plan), by_slot(out, plan))))
        assert_bitwise_equal(results[-1], results[0], f"{ranks} ranks")


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [4, 8])
def test_twin_plain_products_on_a_mesh_have_other_bits(rng, ranks):
    x, w = operands(rng, (65, 4096), (512, 4096), "bfloat16")

    def plain(x, w):
        return lax.psum(jnp.dot(x, w.T), "tp")

    one, many = (
        emulate(plain, ranks=r, in_specs=(P(None, "tp"), P(None, "tp")), out_specs=P())(x, w) for r in (1, ranks)
    )
    assert (bits(one) != bits(many)).any()


@on_the_card
@pytest.mark.gpu
def test_flax_layers(rng):
    import flax.nnx

    x = jnp.asarray(rng.standard_normal((5, 264)), jnp.bfloat16)
    linear = flax.nnx.Linear(
        264,
        40,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        dot_general=make_dot_general(CONTRACT),
        rngs=flax.nnx.Rngs(0),
    )
    assert_bitwise_equal(linear(x)[:3], linear(x[:3]))
    kernel = linear.kernel[...]
    assert_bitwise_equal(
        linear(x), matmul.node_products(x[:, None], kernel.T[None], (Node(0, 1),), dtype=jnp.bfloat16)[0]
    )
