"""Column- and row-parallel products on any mesh, forward and backward, against the specification in NumPy."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, Tree
from tbik_jax.dense import (
    column_parallel,
    column_parallel_parts,
    column_parallel_swiglu,
    make_dot_general,
    pack,
    row_parallel,
    swiglu,
)
from tbik_jax.kernels.matmul import cpu, spec
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import schedule
from tests.meshes import by_slot, columns_by_slot, columns_from_slots, from_slots, mesh_of

LEAVES = 8
CONTRACT = Contract(leaves=LEAVES)
TREE = CONTRACT.tree_over(LEAVES)


# What the bits must be -----------------------------------------------------------------------------------------------


def leaf(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return spec.leaf_product(x.astype(np.float32), w.astype(np.float32), cpu.K_STEP)


def halved(rows: np.ndarray) -> np.ndarray:
    """The tree of a bias's gradient: by halving."""
    while (n := len(rows)) > 1:
        rows = np.concatenate([rows[: n // 2] + rows[n - n // 2 :], rows[n // 2 : n - n // 2]])
    return rows[0]


class Wanted(NamedTuple):
    """Result and gradients; weights by leaf, and so is the gradient of a row-parallel input."""

    y: np.ndarray
    dx: np.ndarray
    dw: np.ndarray
    db: np.ndarray


def wanted_column(x, w, bias, dy, tree: Tree = TREE) -> Wanted:
    """``x [M, K]``, ``w [L, n, K]``, ``bias [L, n]``, ``dy [M, L * n]``."""
    leaves, n, k = w.shape
    wide = dy.astype(np.float32)
    dx = tree.reduce([leaf(wide[:, i * n : (i + 1) * n], w[i].T) for i in range(leaves)], np.add)
    return Wanted(
        (leaf(x, w.reshape(-1, k)) + bias.reshape(-1).astype(np.float32)).astype(x.dtype),
        dx.astype(x.dtype),
        leaf(dy.T, x.T).reshape(w.shape).astype(w.dtype),
        halved(wide).reshape(bias.shape).astype(bias.dtype),
    )


def wanted_row(x, w, bias, dy, tree: Tree = TREE) -> Wanted:
    """``x [L, M, k]``, ``w [L, N, k]``, ``bias [N]``, ``dy [M, N]``."""
    total = tree.reduce([leaf(a, b) for a, b in zip(x, w, strict=True)], np.add)
    return Wanted(
        (total + bias.astype(np.float32)).astype(x.dtype),
        np.stack([leaf(dy, b.T) for b in w]).astype(x.dtype),
        np.stack([leaf(dy.T, a.T) for a in x]).astype(w.dtype),
        halved(dy.astype(np.float32)).astype(bias.dtype),
    )


class Case(NamedTuple):
    """Operands of a column-parallel product (N = 8 * 17 columns) and of a row-parallel one (K = 8 * 9)."""

    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray
    dy: np.ndarray


def column_case(rng: np.random.Generator, m: int, dtype: Any = np.float32, leaves: int = LEAVES) -> Case:
    shapes = (m, 33), (leaves, 17, 33), (leaves, 17), (m, leaves * 17)
    return Case(*(rng.standard_normal(shape).astype(dtype) for shape in shapes))


def row_case(rng: np.random.Generator, m: int, dtype: Any = np.float32, leaves: int = LEAVES) -> Case:
    shapes = (leaves, m, 9), (leaves, 33, 9), (33,), (m, 33)
    return Case(*(rng.standard_normal(shape).astype(dtype) for shape in shapes))


# On a mesh -----------------------------------------------------------------------------------------------------------


def sharded(f: Any, ranks: int, in_specs: Any, out_specs: Any, check_vma: bool = True) -> Any:
    return jax.shard_map(f, mesh=mesh_of(ranks), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def side_by_side(x: jax.Array) -> jax.Array:
    """``[slots, M, k]`` -> ``[M, slots * k]``, as a row-parallel layer gets it."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def local_column(contract: Contract = CONTRACT, leaves: int = LEAVES, axis_name: str | None = "tp") -> Any:
    def run(x, w, bias):
        return column_parallel(x, w, bias.reshape(-1), axis_name=axis_name, contract=contract, leaves=leaves)

    return run


def local_row(contract: Contract = CONTRACT, leaves: int = LEAVES, axis_name: str | None = "tp", **options: Any) -> Any:
    def run(x, w, bias):
        return row_parallel(side_by_side(x), w, bias, axis_name=axis_name, contract=contract, leaves=leaves, **options)

    return run


COLUMN_SPECS = (P(), P("tp"), P("tp"))
ROW_SPECS = (P("tp"), P("tp"), P())


@pytest.mark.invariance
@pytest.mark.parametrize("where", ["inside", pytest.param("outside", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "ranks, m, dtype",
    [(1, 3, "float32"), (2, 8, "float32"), (3, 1, "float32"), (4, 3, "bfloat16"), (5, 8, "float32")]
    + [(6, 3, "bfloat16"), (7, 3, "float32"), (8, 1, "bfloat16")],
)
def test_any_mesh_forward_and_backward(rng, ranks, m, dtype, where):
    """Gradients taken inside ``shard_map`` and around it, both under ``check_vma=True``; NaN in unread slots."""
    plan = schedule(TREE, ranks)
    column, row = column_case(rng, m, dtype), row_case(rng, m, dtype)

    def pulled(f, dy, *operands):
        y, pull = jax.vjp(f, *operands)
        return y, pull(dy)

    if where == "inside":
        run_column = sharded(
            partial(pulled, local_column()), ranks, (P(None, "tp"), *COLUMN_SPECS), (P(None, "tp"), COLUMN_SPECS)
        )
        run_row = sharded(partial(pulled, local_row()), ranks, (P(), *ROW_SPECS), (P(), ROW_SPECS))
    else:
        run_column = partial(pulled, sharded(local_column(), ranks, COLUMN_SPECS, P(None, "tp")))
        run_row = partial(pulled, sharded(local_row(), ranks, ROW_SPECS, P()))

    @jax.jit
    def both(column, row):
        return run_column(*column), run_row(*row)

    slotted = partial(by_slot, plan=plan)
    (y, (dx, dw, db)), (row_y, (row_dx, row_dw, row_db)) = both(
        (columns_by_slot(column.dy, plan, 0.0), column.x, slotted(column.w), slotted(column.bias)),
        (row.dy, slotted(row.x), slotted(row.w), row.bias),
    )
    got = Wanted(columns_from_slots(y, plan), dx, from_slots(dw, plan), from_slots(db, plan))
    assert_bitwise_equal(got, wanted_column(*column), "column_parallel")
    got = Wanted(row_y, from_slots(row_dx, plan), from_slots(row_dw, plan), row_db)
    assert_bitwise_equal(got, wanted_row(*row), "row_parallel")


@pytest.mark.invariance
@pytest.mark.parametrize("m", [1, 3, 65])
def test_one_device_without_an_axis(rng, m):
    column, row = column_case(rng, m), row_case(rng, m)

    @jax.jit
    def both(column, row):
        results = []
        for f, (*operands, dy) in ((local_column(axis_name=None), column), (local_row(axis_name=None), row)):
            y, pull = jax.vjp(f, *operands)
            results.append(Wanted(y, *pull(dy)))
        return results

    assert_bitwise_equal(both(tuple(column), tuple(row)), [wanted_column(*column), wanted_row(*row)])


@pytest.mark.invariance
@pytest.mark.parametrize(
    "ranks, contract, leaves", [(5, Contract(leaves=9, tree=(3, 2)), 9), (3, Contract(tree=(8,)), 24)]
)
def test_other_trees(rng, ranks, contract, leaves):
    tree = contract.tree_over(leaves)
    plan = schedule(tree, ranks)
    column, row = column_case(rng, 3, leaves=leaves), row_case(rng, 3, leaves=leaves)

    def both(x, w, bias, dy, row_x, row_w, row_bias):
        _, pull = jax.vjp(local_column(contract, leaves), x, w, bias)
        return pull(dy)[0], local_row(contract, leaves)(row_x, row_w, row_bias)

    run = jax.jit(sharded(both, ranks, (*COLUMN_SPECS, P(None, "tp"), *ROW_SPECS), P()))
    slotted = partial(by_slot, plan=plan)
    got = run(
        column.x,
        slotted(column.w),
        slotted(column.bias),
        columns_by_slot(column.dy, plan, 0.0),
        slotted(row.x),
        slotted(row.w),
        row.bias,
    )
    assert_bitwise_equal(got, (wanted_column(*column, tree).dx, wanted_row(*row, tree).y))


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_weights_in_two_dimensions(rng, ranks):
    """Where the mesh divides the leaves, a plain ``P("tp")`` sharding of Hugging Face's weight is the leaf layout."""
    column, row = column_case(rng, 3), row_case(rng, 3)

    def both(x, w, bias, dy, row_x, row_w, row_bias):
        y, pull = jax.vjp(partial(column_parallel, axis_name="tp", contract=CONTRACT), x, w, bias)
        return y, pull(dy)[0], row_parallel(row_x, row_w, row_bias, axis_name="tp", contract=CONTRACT)

    split = P(None, "tp")
    run = jax.jit(sharded(both, ranks, (P(), P("tp"), P("tp"), split, split, split, P()), (split, P(), P())))
    x, w, bias, dy = column
    got = run(
        x,
        w.reshape(-1, w.shape[-1]),
        bias.reshape(-1),
        dy,
        np.moveaxis(row.x, 0, 1).reshape(3, -1),
        np.moveaxis(row.w, 0, 1).reshape(33, -1),
        row.bias,
    )
    want = wanted_column(*column)
    assert_bitwise_equal(got, (want.y, want.dx, wanted_row(*row).y))


@pytest.mark.invariance
@pytest.mark.parametrize("tokens, k, n", [(256, 256, 256), (160, 256, 256), (200, 512, 256)])
def test_the_weight_gradient_at_round_sizes(rng, tokens, k, n):
    """Transposes of the backward pass must not melt into the dots: where sizes are round, that has another order."""
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in ((tokens, k), (n, k), (tokens, n)))

    def gradients(x, w, dy):
        return jax.vjp(partial(column_parallel, axis_name="tp", contract=CONTRACT), x, w)[1](dy)

    def run(ranks):
        return jax.jit(sharded(gradients, ranks, (P(), P("tp"), P(None, "tp")), (P(), P("tp"))))(x, w, dy)

    assert_bitwise_equal(run(8), run(1))


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ["auto", "all_gather", "all_to_all", "recursive_halving", "butterfly"])
def test_the_input_gradient_by_any_exchange(rng, algorithm, dtype):
    """On one rank, whose kernel rounds, and on four, whose sum does. Leaves cancel, or rounding would hide another order."""
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in ((65, 257), (8, 129, 257), (65, 8, 129)))
    w[4:], dy[:, 4:] = -w[:4] * (1 + 2.0**-7), dy[:, :4]
    x, w, dy = (jnp.asarray(v, dtype) for v in (x, w.reshape(8 * 129, 257), dy.reshape(65, 8 * 129)))

    def gradient(x, w, dy):
        f = partial(column_parallel, axis_name="tp", contract=CONTRACT, algorithm=algorithm)
        return jax.vjp(f, x, w)[1](dy)[0]

    def run(ranks):
        return jax.jit(sharded(gradient, ranks, (P(), P("tp"), P(None, "tp")), P()))(x, w, dy)

    assert_bitwise_equal(run(4), run(1))


def test_twin_a_plain_input_gradient(rng):
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in ((9, 33), (8 * 5, 33), (9, 8 * 5)))

    def gradient(x, w, dy):
        return jax.lax.psum(jnp.dot(dy, w), "tp")

    def run(ranks):
        return jax.jit(sharded(gradient, ranks, (P(), P("tp"), P(None, "tp")), P()))(x, w, dy)

    assert np.asarray(run(4)).tobytes() != np.asarray(run(1)).tobytes()


def test_twin_a_plain_weight_gradient_at_a_round_size(rng):
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in ((200, 512), (256, 512), (200, 256)))

    def gradient(x, w, dy):
        return jax.vjp(lambda w: jnp.dot(x, w.T), w)[1](dy)[0]

    def run(ranks):
        return jax.jit(sharded(gradient, ranks, (P(), P("tp"), P(None, "tp")), P("tp")))(x, w, dy)

    assert (bits(run(8)) != bits(run(1))).any()


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("m", [1, 65])
def test_packed_weights(rng, ranks, m):
    plan = schedule(TREE, ranks)
    column, row = column_case(rng, m), row_case(rng, m)

    def both(x, w, bias, row_x, row_w, row_bias):
        one_leaf = pack(w.reshape(1, -1, w.shape[-1]))
        return local_column()(x, one_leaf, bias), local_row()(row_x, pack(row_w), row_bias)

    run = jax.jit(sharded(both, ranks, COLUMN_SPECS + ROW_SPECS, (P(None, "tp"), P())))
    slotted = partial(by_slot, plan=plan)
    y, row_y = run(column.x, slotted(column.w), slotted(column.bias), slotted(row.x), slotted(row.w), row.bias)
    assert_bitwise_equal((columns_from_slots(y, plan), row_y), (wanted_column(*column).y, wanted_row(*row).y))


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_scattered_along_the_sequence(rng, ranks):
    """Batch 2, a sequence of 12 over the ranks: forward and backward are slices of the whole."""
    plan = schedule(TREE, ranks)
    row = row_case(rng, 24)
    x = row.x.reshape(LEAVES, 2, 12, 9)
    dy = row.dy.reshape(2, 12, 33)

    def run(dy, x, w):
        def f(x, w):
            x = jnp.moveaxis(x, 0, -2)
            return row_parallel(
                x.reshape(2, 12, -1), w, axis_name="tp", contract=CONTRACT, leaves=LEAVES, scatter_dimension=1
            )

        y, pull = jax.vjp(f, x, w)
        return y, pull(dy)

    part = P(None, "tp")
    y, (dx, dw) = jax.jit(sharded(run, ranks, (part, P("tp"), P("tp")), (part, (P("tp"), P("tp")))))(
        dy, by_slot(x, plan), by_slot(row.w, plan)
    )
    want = wanted_row(row.x, row.w, np.zeros(33, np.float32), row.dy)
    got = y, from_slots(dx, plan), from_slots(dw, plan)
    assert_bitwise_equal(got, (want.y.reshape(dy.shape), want.dx.reshape(x.shape), want.dw))


@pytest.mark.invariance
def test_the_exchange_cannot_be_seen(rng):
    row = row_case(rng, 3)
    for algorithm in ("all_gather", "all_to_all", "recursive_halving", "butterfly"):
        run = jax.jit(sharded(local_row(algorithm=algorithm), 4, ROW_SPECS, P()))
        assert_bitwise_equal(run(*row[:3]), wanted_row(*row).y, algorithm)
        unchecked = jax.jit(sharded(local_row(algorithm=algorithm), 4, ROW_SPECS, P(), check_vma=False))
        assert_bitwise_equal(unchecked(*row[:3]), wanted_row(*row).y, f"{algorithm}, check_vma=False")


@pytest.mark.invariance
def test_tokens_do_not_see_each_other(rng):
    column, row = column_case(rng, 130), row_case(rng, 130)

    @jax.jit
    def both(x, w, bias, row_x, row_w, row_bias):
        return local_column(axis_name=None)(x, w, bias), local_row(axis_name=None)(row_x, row_w, row_bias)

    want = wanted_column(*column).y, wanted_row(*row).y
    for rows in (slice(0, 1), slice(129, 130), slice(5, 8), slice(0, 64)):
        got = both(column.x[rows], *column[1:3], row.x[:, rows], *row[1:3])
        assert_bitwise_equal(got, tuple(y[rows] for y in want), f"rows {rows}")


@pytest.mark.invariance
def test_leading_dimensions_and_output_dtype(rng):
    column = column_case(rng, 6, "bfloat16")
    f = partial(column_parallel, axis_name=None, contract=CONTRACT)
    x, w, bias = column.x, column.w.reshape(-1, 33), column.bias.reshape(-1)
    want = wanted_column(*column).y
    assert_bitwise_equal(jax.jit(f)(x.reshape(2, 3, 33), w, bias), want.reshape(2, 3, -1))
    assert_bitwise_equal(jax.jit(f)(x[0], w, bias), want[0])
    in_f32 = leaf(x, w) + bias.astype(np.float32)
    assert_bitwise_equal(jax.jit(partial(f, dtype=jnp.float32))(x, w, bias), in_f32)
    row = row_case(rng, 6, "bfloat16")
    flat = np.moveaxis(row.x, 0, 1).reshape(6, -1)
    g = partial(row_parallel, axis_name=None, contract=CONTRACT)
    assert_bitwise_equal(jax.jit(g)(flat.reshape(3, 2, -1), row.w, row.bias), wanted_row(*row).y.reshape(3, 2, -1))
    assert_bitwise_equal(jax.jit(g)(flat[0], row.w, row.bias), wanted_row(*row).y[0])


# Twins and values ----------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [3, 5, 8])
def test_twin_plain_dots_and_psum_have_other_bits_on_a_mesh(rng, ranks):
    row, plan = row_case(rng, 8), schedule(TREE, ranks)

    def plain(x, w, bias):
        return lax.psum(side_by_side(x) @ side_by_side(w).T, "tp") + bias

    one = jax.jit(lambda x, w, bias: side_by_side(x) @ side_by_side(w).T + bias)(*row[:3])
    slotted = partial(by_slot, plan=plan, fill=0.0)
    many = jax.jit(sharded(plain, ranks, ROW_SPECS, P()))(slotted(row.x), slotted(row.w), row.bias)
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)
    assert (bits(many) != bits(one)).any()


@pytest.mark.invariance
def test_twin_autodiff_of_a_bias_depends_on_the_local_columns(rng):
    @jax.jit
    def plain(dy):
        return jax.vjp(lambda bias: jnp.zeros_like(dy) + bias, jnp.zeros(dy.shape[1]))[1](dy)[0]

    differs = []
    for tokens in (33, 2048):
        dy = rng.standard_normal((tokens, 240)).astype(np.float32)
        whole = np.asarray(plain(dy))
        differs += [(bits(plain(dy[:, :n])) != bits(whole[:n])).any() for n in (17, 30, 80)]
    assert any(differs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accuracy(rng, dtype):
    """Result and gradients of a layer against float64, K and N of some hundreds: float32 sums, then one rounding."""
    m, n, k = 65, 264, 520
    x, w, dy = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (n, k), (m, n)))
    bias = rng.standard_normal(n).astype(dtype)
    wide_x, wide_w, wide_dy = (a.astype(np.float64) for a in (x, w, dy))
    exact = (wide_x @ wide_w.T + bias.astype(np.float64), wide_dy @ wide_w, wide_dy.T @ wide_x, wide_dy.sum(0))
    last = 2.0**-8 if dtype == "bfloat16" else 0.0
    for f in (column_parallel, row_parallel):

        @jax.jit
        def run(x, w, bias, dy, f=f):
            y, pull = jax.vjp(partial(f, axis_name=None, contract=CONTRACT), x, w, bias)
            return y, *pull(dy)

        for got, want in zip(run(x, w, bias, dy), exact, strict=True):
            # Sums of 520 products of size one: seen to err by up to 1e-5.
            tolerance = 5e-5 + 1.01 * last * np.abs(want)
            assert (np.abs(np.asarray(got).astype(np.float64) - want) <= tolerance).all(), f.__name__


# Flax ----------------------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flax_nnx_linear(rng, dtype):
    column = column_case(rng, 5, dtype)
    kernel, bias = jnp.asarray(column.w.reshape(-1, 33).T), jnp.asarray(column.bias.reshape(-1))
    layer = flax.nnx.Linear(
        33, 136, dot_general=make_dot_general(CONTRACT), dtype=dtype, param_dtype=dtype, rngs=flax.nnx.Rngs(0)
    )
    layer.kernel[...], layer.bias[...] = kernel, bias
    rounded = leaf(column.x, column.w.reshape(-1, 33)).astype(dtype)  # Flax adds its bias to the rounded product
    got = flax.nnx.jit(lambda layer, x: layer(x))(layer, column.x)
    assert_bitwise_equal(got, rounded + column.bias.reshape(-1))

    layer = flax.nnx.Linear(
        33,
        136,
        use_bias=False,
        dot_general=make_dot_general(CONTRACT),
        dtype=dtype,
        param_dtype=dtype,
        rngs=flax.nnx.Rngs(0),
    )
    layer.kernel[...] = kernel
    gradient = flax.nnx.jit(flax.nnx.grad(lambda layer, x, dy: (layer(x) * dy).astype(jnp.float32).sum()))
    dw = gradient(layer, column.x, column.dy).kernel[...]
    assert_bitwise_equal(dw, leaf(column.dy.T, column.x.T).T.astype(dtype))


@pytest.mark.invariance
def test_flax_linen_dense(rng):
    column = column_case(rng, 5)
    layer = flax.linen.Dense(136, dot_general=make_dot_general(CONTRACT))
    parameters = {"params": {"kernel": column.w.reshape(-1, 33).T, "bias": column.bias.reshape(-1)}}
    for m in (1, 5):
        got = jax.jit(layer.apply)(parameters, column.x[:m])
        assert_bitwise_equal(got, wanted_column(*column).y[:m])


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_row_parallel_flax_layer(rng, ranks):
    row = row_case(rng, 5)
    x, kernel = side_by_side(row.x), side_by_side(row.w).T

    def run(x, kernel):
        layer = flax.linen.Dense(
            33, use_bias=False, dot_general=make_dot_general(CONTRACT, axis_name="tp", leaves=LEAVES)
        )
        return layer.apply({"params": {"kernel": kernel}}, x)

    got = jax.jit(sharded(run, ranks, (P(None, "tp"), P("tp")), P()))(x, kernel)
    assert_bitwise_equal(got, wanted_row(row.x, row.w, np.zeros(33, np.float32), row.dy).y)


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(f: Any, ranks: int, *shapes: tuple[int, ...], error: type[Exception] = ValueError) -> str:
    """The text of the error when every rank has operands of these shapes."""
    operands = [jax.ShapeDtypeStruct((ranks * shape[0], *shape[1:]), jnp.float32) for shape in shapes]
    with pytest.raises(error) as caught:
        jax.jit(sharded(f, ranks, (P("tp"),) * len(shapes), P("tp"))).trace(*operands)
    return str(caught.value)


column_of = partial(column_parallel, axis_name="tp", contract=CONTRACT)
row_of = partial(row_parallel, axis_name="tp", contract=CONTRACT)


@pytest.mark.parametrize("f, where", [(column_of, "dense.column_parallel"), (row_of, "dense.row_parallel")])
def test_a_mesh_larger_than_the_leaves(f, where):
    text = refused(f, 16, (3, 8), (16, 8))
    assert text.startswith(where)
    assert "axis 'tp' has 16 ranks but the dimension only 8 leaves: use a smaller mesh, or a contract with more" in text


@pytest.mark.parametrize("f", [column_of, row_of])
def test_wrong_slots(f):
    text = refused(partial(f, leaves=8), 3, (3, 8), (2, 5, 8))
    assert "w has 2 slots; 8 leaves over 3 ranks need 3" in text


def test_slots_alone_do_not_say_how_many_leaves():
    """Three slots on three ranks: seven, eight or nine leaves, three different trees."""
    text = refused(row_of, 3, (3, 24), (3, 5, 8))
    assert text == "dense.row_parallel: 3 slots per rank do not say how many leaves all ranks hold; pass leaves="
    text = refused(lambda x, w: row_of(x, pack(w)), 3, (3, 24), (3, 5, 8))
    assert "3 slots per rank do not say how many leaves" in text
    # Forward, a column-parallel product needs no tree; its gradient does.
    text = refused(lambda x, w: jax.grad(lambda x: column_of(x, w).sum())(x), 3, (3, 8), (3, 5, 8))
    assert "dense.column_parallel, input gradient: 3 slots per rank do not say how many leaves" in text


@pytest.mark.parametrize("f", [column_of, row_of])
def test_leaves_that_do_not_divide(f):
    text = refused(f, 3, (3, 8), (8, 8))
    assert "w has 8 local units for 8 leaves over 3 ranks: they are no whole, equal leaves. Give w by leaf" in text
    text = refused(f, 2, (3, 9), (9, 9))
    assert "w has 9 local units for 8 leaves over 2 ranks" in text


@pytest.mark.parametrize("f", [column_of, row_of])
@pytest.mark.parametrize("shape", [(8,), (8, 8, 8, 8)])
def test_a_weight_of_other_dimensions(f, shape):
    assert f"w has shape {shape}; give [N, K], or [slots, ., .] by leaf" in refused(f, 1, (3, 8), shape)


def test_contractions_that_do_not_match():
    assert "x has K = 9, w has shape (8, 8); w is [N, K] (output, input)" in refused(column_of, 1, (3, 9), (8, 8))
    assert "x has K = 9, w has 8 slots of 2" in refused(row_of, 1, (3, 9), (8, 16))
    text = refused(lambda x, w: column_of(x, pack(w)), 1, (3, 9), (1, 5, 8))
    assert "x has K = 9; the packed weight (1, 5, 8) is no [1, N, K]" in text
    text = refused(lambda x, w: column_of(x, pack(w)), 1, (3, 8), (2, 5, 8))
    assert "the packed weight (2, 5, 8) is no [1, N, K]" in text
    text = refused(lambda x, w: row_of(x, pack(w)), 1, (3, 9), (2, 5, 8))
    assert "x has K = 9, w has 2 slots of 8" in text


@pytest.mark.parametrize("f", [column_of, row_of])
def test_a_bias_of_another_length(f):
    assert "bias has shape (1,), the result (3, 8); give one value per local column" in refused(
        f, 1, (3, 8), (8, 8), (1,)
    )


def test_the_gradient_of_a_packed_weight():
    message = "packed weights are laid out for inference; differentiate with the [N, K] weight instead"
    for f, shape in ((column_of, (1, 5, 8)), (row_of, (1, 5, 8))):
        text = refused(
            lambda x, w, f=f: jax.grad(lambda x: f(x, pack(w)).sum())(x), 1, (3, 8), shape, error=NotImplementedError
        )
        assert text == message


def test_outside_shard_map():
    with pytest.raises(ValueError, match=r"axis 'tp' is not bound: call this inside jax\.shard_map"):
        row_of(jnp.ones((3, 8)), jnp.ones((8, 8)))


@pytest.mark.parametrize(
    "lhs, rhs, dimensions, options, message",
    [
        ((3, 8), (8, 5), (((0,), (0,)), ((), ())), {}, "only the last of lhs with the first of rhs"),
        ((3, 8), (5, 8), (((1,), (1,)), ((), ())), {}, "only the last of lhs with the first of rhs"),
        ((2, 3, 8), (2, 8, 5), (((2,), (1,)), ((0,), (0,))), {}, "only 2-d kernels [K, N]"),
        ((3, 8), (8, 5, 2), (((1,), (0,)), ((), ())), {}, "a kernel of shape (8, 5, 2); only 2-d kernels [K, N]"),
        ((3, 8), (8, 5), (((1,), (0,)), ((), ())), {"precision": "highest"}, "the contract fixes the accumulation"),
        ((3, 8), (8, 5), (((1,), (0,)), ((), ())), {"out_sharding": "x"}, "out_sharding='x'"),
    ],
)
def test_a_dot_general_that_is_no_linear_layer(lhs, rhs, dimensions, options, message):
    with pytest.raises(NotImplementedError, match=r"^dense\.dot_general: ") as error:
        make_dot_general(CONTRACT)(jnp.ones(lhs), jnp.ones(rhs), dimensions, **options)
    assert message in str(error.value)


# Projections side by side ----------------------------------------------------------------------------------------------


PARTS = 33, 8, 1


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_projections_side_by_side_are_those_alone(rng, packed, biased, dtype):
    x = jnp.asarray(rng.standard_normal((2, 5, 333)), dtype)
    w = [jnp.asarray(rng.standard_normal((n, 333)), dtype) for n in PARTS]
    biases = [jnp.asarray(rng.standard_normal(n), dtype) for n in PARTS] if biased else None
    joint = jnp.concatenate(w)[None]
    found = column_parallel_parts(x, pack(joint) if packed else joint, PARTS, biases)
    for i, y in enumerate(found):
        alone = column_parallel(x, w[i], biases[i] if biases else None, axis_name=None, contract=Contract(), leaves=1)
        assert_bitwise_equal(y, alone, f"projection {i}")


@pytest.mark.invariance
def test_twin_plain_projections_side_by_side_are_others(rng):
    x, w = rng.standard_normal((10, 333)), [rng.standard_normal((n, 333)) for n in PARTS]
    x, *w = (jnp.asarray(a, jnp.float32) for a in (x, *w))
    joint = jnp.split(jax.jit(jnp.dot)(x, jnp.concatenate(w).T), np.cumsum(PARTS)[:-1].tolist(), axis=-1)
    assert any((bits(y) != bits(jax.jit(jnp.dot)(x, v.T))).any() for y, v in zip(joint, w, strict=True))


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [3, pytest.param(70, marks=pytest.mark.slow)])
def test_gated_projections_are_the_stages_one_by_one(rng, rows, packed, biased, dtype):
    x = jnp.asarray(3 * rng.standard_normal((2, rows, 333)), dtype)
    w = [jnp.asarray(rng.standard_normal((33, 333)), dtype) for _ in range(2)]
    biases = [jnp.asarray(rng.standard_normal(33), dtype) for _ in range(2)] if biased else None
    joint = jnp.concatenate(w)[None]
    found = column_parallel_swiglu(x, pack(joint) if packed else joint, biases)
    gate, up = (
        column_parallel(x, w[i], biases[i] if biases else None, axis_name=None, contract=Contract(), leaves=1)
        for i in range(2)
    )
    assert found.dtype == dtype
    assert_bitwise_equal(found, swiglu(gate, up))


def test_gated_projections_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="column_parallel_swiglu: 3 problems") as error:
        column_parallel_swiglu(jnp.ones((2, 8)), jnp.ones((1, 5, 9)), [jnp.ones(2)])
    for message in ("x has K = 8, w has K = 9", "w has 5 rows", "one bias for gate and one for up"):
        assert message in str(error.value)
    with pytest.raises(NotImplementedError, match="projections side by side are for inference"):
        jax.grad(lambda x: column_parallel_swiglu(x, jnp.ones((1, 4, 8))).sum())(jnp.ones((2, 8)))


def test_projections_side_by_side_refuse_what_does_not_fit():
    x, w = jnp.ones((2, 8)), jnp.ones((1, 5, 9))
    with pytest.raises(ValueError, match="column_parallel_parts: 3 problems") as error:
        column_parallel_parts(x, w, (2, 2), [jnp.ones(2)])
    for message in (
        "x has K = 8, w has K = 9",
        "parts (2, 2) make 4 columns, w has 5",
        "give one bias per part, or none",
    ):
        assert message in str(error.value)
    with pytest.raises(NotImplementedError, match="projections side by side are for inference"):
        jax.grad(lambda x: column_parallel_parts(x, jnp.ones((1, 5, 8)), (2, 3))[0].sum())(x)


def test_gradients_of_parameters_that_data_parallel_ranks_share_are_refused(rng):
    """Autodiff would add them by psum, the bias's too."""
    x, w, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 8), (8, 8), (8,)))

    def run(of: int, x: Any, w: Any, bias: Any) -> Any:
        def loss(w: Any, bias: Any) -> Any:
            return jnp.sum(column_parallel(x, w, bias, axis_name=None, contract=CONTRACT))

        return jax.grad(loss, argnums=of)(w, bias)

    for of in (0, 1):
        call = jax.shard_map(partial(run, of), mesh=mesh_of(2, "dp"), in_specs=(P("dp"), P(), P()), out_specs=P())
        with pytest.raises(ValueError, match="must produce an output with the same type"):
            jax.jit(call)(x, w, bias)
