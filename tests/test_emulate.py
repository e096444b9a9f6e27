"""A mesh emulated on one device: every bit of ``shard_map`` over as many devices, collectives and gradients included."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, Tree, emulate, tree_all_gather, tree_psum, tree_psum_scatter
from tbik_jax.dense import Vocabulary, attention, column_parallel, pack, rms_norm, rope, row_parallel, swiglu
from tbik_jax.kernels import matmul
from tbik_jax.kernels.batching import one_by_one
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import Schedule, schedule
from tests.dense import test_vocabulary as of_vocabulary
from tests.meshes import by_slot, columns_by_slot, columns_from_slots, from_slots, mesh_of

LEAVES = 8
CONTRACT = Contract(leaves=LEAVES)
TREE = CONTRACT.tree_over(LEAVES)
DIM, COLUMNS, HEAD = 33, 17, 5  # of the model, of a leaf of the feed-forward layer, of a head
WHOLE, SPLIT = P(), P("tp")

RANKS = [1, 3]
any_batch = pytest.mark.parametrize("m, dtype", [(3, "bfloat16"), pytest.param(65, "float32", marks=pytest.mark.slow)])


def sharded(f: Any, ranks: int, in_specs: Any, out_specs: Any, check_vma: bool = True) -> Any:
    return jax.jit(jax.shard_map(f, mesh=mesh_of(ranks), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma))


def emulated(f: Any, ranks: int, in_specs: Any, out_specs: Any, **options: Any) -> Any:
    return emulate(f, ranks=ranks, in_specs=in_specs, out_specs=out_specs, **options)


def some(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


# Layers --------------------------------------------------------------------------------------------------------------

column = partial(column_parallel, axis_name="tp", contract=CONTRACT, leaves=LEAVES)
row = partial(row_parallel, axis_name="tp", contract=CONTRACT, leaves=LEAVES)


def mlp(x, scale, gate, up, down, bias):
    x = rms_norm(x, scale, eps=1e-5)
    return row(swiglu(column(x, gate), column(x, up)), down, bias)


def projections(x, q, k, v, o):
    """The products around attention, whose own backward pass does not exist yet."""
    return row(swiglu(swiglu(column(x, q), column(x, k)), column(x, v)), o)


def attend(x, q, k, v, o):
    """Causal attention over the tokens of ``x``, a KV head for every head."""
    q, k, v = (column(x, w).reshape(1, len(x), -1, HEAD) for w in (q, k, v))
    y = attention(
        q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions=jnp.arange(len(x))[None], scale=HEAD**-0.5, kv_block=64
    )
    return row(y.reshape(len(x), -1), o)


def with_gradients(layer: Any) -> Any:
    def run(dy, *operands):
        y, pull = jax.vjp(layer, *operands)
        return y, pull(dy)

    return run


MLP_SPECS = (WHOLE, WHOLE, SPLIT, SPLIT, SPLIT, WHOLE)
PROJECTION_SPECS = (WHOLE, SPLIT, SPLIT, SPLIT, SPLIT)


def mlp_case(rng: np.random.Generator, m: int, dtype: str) -> list[np.ndarray]:
    wide, narrow = (LEAVES, COLUMNS, DIM), (LEAVES, DIM, COLUMNS)
    return [some(rng, dtype, *shape) for shape in ((m, DIM), (DIM,), wide, wide, narrow, (DIM,))]


def projection_case(rng: np.random.Generator, m: int, dtype: str) -> list[np.ndarray]:
    wide, narrow = (LEAVES, HEAD, DIM), (LEAVES, DIM, HEAD)
    return [some(rng, dtype, *shape) for shape in ((m, DIM), wide, wide, wide, narrow)]


def on_all_meshes(run: Any, ranks: int, values: list[np.ndarray], in_specs: Any, out_specs: Any) -> Any:
    """Emulated, with every leaf in its place again. Unread slots of weights hold NaN.

    On several ranks also checked against ``shard_map``, whose own invariance is shown elsewhere.
    """
    plan = schedule(TREE, ranks)
    values = [by_slot(x, plan) if spec == SPLIT else x for x, spec in zip(values, in_specs, strict=True)]
    got = emulated(run, ranks, in_specs, out_specs)(*values)
    if ranks > 1:
        assert_bitwise_equal(got, sharded(run, ranks, in_specs, out_specs)(*values), f"{ranks} ranks")
    return jax.tree.map(
        lambda spec, x: from_slots(x, plan) if spec == SPLIT else x, out_specs, got, is_leaf=lambda x: isinstance(x, P)
    )


@pytest.mark.invariance
@any_batch
@pytest.mark.parametrize(
    "layer, case, specs",
    [(mlp, mlp_case, MLP_SPECS), (projections, projection_case, PROJECTION_SPECS)],
    ids=["mlp", "projections"],
)
def test_layers_forward_and_backward(rng, layer, case, specs, m, dtype):
    values = [some(rng, dtype, m, DIM), *case(rng, m, dtype)]
    run, in_specs, out_specs = with_gradients(layer), (WHOLE, *specs), (WHOLE, specs)
    want = on_all_meshes(run, 1, values, in_specs, out_specs)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(want))
    for ranks in RANKS[1:]:
        assert_bitwise_equal(on_all_meshes(run, ranks, values, in_specs, out_specs), want, f"{ranks} ranks")


@pytest.mark.invariance
@pytest.mark.slow
@any_batch
def test_attention(rng, m, dtype):
    values = projection_case(rng, m, dtype)
    want = on_all_meshes(attend, 1, values, PROJECTION_SPECS, WHOLE)
    for ranks in RANKS[1:]:
        assert_bitwise_equal(on_all_meshes(attend, ranks, values, PROJECTION_SPECS, WHOLE), want, f"{ranks} ranks")


@pytest.mark.invariance
@pytest.mark.slow
@pytest.mark.parametrize("ranks, m", [(3, 65), (8, 1)])
def test_packed_weights(rng, ranks, m):
    x, _, gate, up, down, _ = mlp_case(rng, m, "float32")
    plan = schedule(TREE, ranks)

    def run(packed, x, gate, up, down):
        lay = pack if packed else lambda w: w
        rows = [lay(w.reshape(1, -1, DIM)) if packed else w for w in (gate, up)]
        return row(swiglu(*(column(x, w) for w in rows)), lay(down))

    specs = (WHOLE, SPLIT, SPLIT, SPLIT)
    values = (x, *(by_slot(w, plan) for w in (gate, up, down)))
    want = sharded(partial(run, False), ranks, specs, WHOLE)(*values)
    assert_bitwise_equal(emulated(partial(run, True), ranks, specs, WHOLE)(*values), want)
    # Packed beforehand: the leaves of a pytree are sliced like any other arrays.
    outside = emulated(lambda x, w: row(x, w), ranks, (P(None, "tp"), SPLIT), WHOLE)
    h = columns_by_slot(some(rng, np.float32, m, LEAVES * COLUMNS), plan)
    inside = emulated(lambda x, w: row(x, w), 1, (P(None, "tp"), SPLIT), WHOLE)
    assert_bitwise_equal(outside(h, pack(by_slot(down, plan))), inside(columns_from_slots(h, plan), pack(down)))


@pytest.mark.invariance
@pytest.mark.parametrize(
    "size, m, dtype", [pytest.param(259, 8, "float32", marks=pytest.mark.slow), (9, 3, "bfloat16")]
)
def test_vocabulary(rng, size, m, dtype):
    """Embedding, logits, log-softmax and cross-entropy, forward and backward."""
    vocabulary = Vocabulary(size, CONTRACT, "tp")
    tokens, table, hidden, labels, dy, d_log_p, d_loss = values = of_vocabulary.inputs(rng, size, m, dtype)
    in_specs = (WHOLE, SPLIT, WHOLE, WHOLE, WHOLE, P(None, "tp"), WHOLE)
    for ranks in RANKS:
        plan = schedule(vocabulary.tree, ranks)
        got = emulated(partial(of_vocabulary.on_every_rank, vocabulary), ranks, in_specs, of_vocabulary.OUT)(
            tokens,
            of_vocabulary.table_by_slot(table, vocabulary, plan),
            hidden,
            labels,
            dy,
            columns_by_slot(of_vocabulary.padded(d_log_p, vocabulary, 0.0, 1), plan),
            d_loss,
        )
        for name, spec in of_vocabulary.OUT.items():
            if spec == SPLIT:
                got[name] = of_vocabulary.table_from_slots(got[name], vocabulary, plan)
            elif spec != WHOLE:
                got[name] = columns_from_slots(got[name], plan)[:, :size]
        assert_bitwise_equal(got, of_vocabulary.wanted(vocabulary, *values), f"{ranks} ranks")


# Collectives ---------------------------------------------------------------------------------------------------------


def algorithms(plan: Schedule) -> list[str]:
    pairwise = ["butterfly", "recursive_halving"] if plan.is_butterfly else []
    return ["auto", "all_gather", "all_to_all", *pairwise]


@pytest.mark.invariance
@pytest.mark.slow
@pytest.mark.parametrize(
    "tree, ranks",
    [(Tree(8), 8), (Tree(8, (4, 2)), 3), (Tree(8, (4, 2)), 4), (Tree(9, (3, 2)), 8), (Tree(24), 3)],
    ids=str,
)
def test_every_exchange(rng, tree, ranks):
    """Sums, slices and gradients, by every algorithm that the mesh can run; NaN in unread slots."""
    plan = schedule(tree, ranks)
    leaves, dy = some(rng, np.float32, tree.leaves, 3, ranks), some(rng, np.float32, 3, ranks)

    def run(v, dy, dy_part):
        totals, parts, wholes, gradients = [], [], [], []
        for name in algorithms(plan):
            total, pull = jax.vjp(partial(tree_psum, axis_name="tp", tree=tree, algorithm=name), v)
            scatter = partial(tree_psum_scatter, axis_name="tp", tree=tree, scatter_dimension=1, algorithm=name)
            part, pull_part = jax.vjp(scatter, v)
            whole, pull_whole = jax.vjp(lambda x: tree_all_gather(x, "tp", gather_dimension=1), part)
            totals.append(total), parts.append(part), wholes.append(whole)
            gradients.append((pull(dy), pull_part(dy_part), pull_part(pull_whole(dy)[0])))
        return totals, parts, wholes, gradients

    specs = (SPLIT, WHOLE, P(None, "tp")), (WHOLE, P(None, "tp"), WHOLE, SPLIT)
    operands = by_slot(leaves, plan), dy, dy
    got = emulated(run, ranks, *specs)(*operands)
    for check_vma in (True, False):
        assert_bitwise_equal(got, sharded(run, ranks, *specs, check_vma=check_vma)(*operands))
    want = tree.reduce(list(leaves), np.add)
    for totals in got[:3]:
        for name, total in zip(algorithms(plan), totals, strict=True):
            assert_bitwise_equal(total, want, name)


@pytest.mark.invariance
def test_a_mesh_of_two_axes(rng):
    """Tokens over two, columns over three ranks: a rank of one axis emulated inside a rank of the other."""
    x, *weights = mlp_case(rng, 6, "float32")
    plan = schedule(TREE, 3)
    values = [by_slot(w, plan) if spec == SPLIT else w for w, spec in zip(weights, MLP_SPECS[1:], strict=True)]

    def run(x, *weights):
        return mlp(x, *weights), lax.psum(jnp.int32(1), ("dp", "tp")), lax.axis_index("dp")[None]

    inner = emulated(run, 3, MLP_SPECS, (WHOLE, WHOLE, WHOLE))
    got = emulated(inner, 2, (P("dp"), *[WHOLE] * 5), (P("dp"), WHOLE, P("dp")), axis_name="dp")(x, *values)
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("dp", "tp"))
    specs = (P("dp"), *MLP_SPECS[1:])
    on_mesh = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P("dp"), WHOLE, P("dp")))
    assert_bitwise_equal(got, jax.jit(on_mesh)(x, *values))
    assert_bitwise_equal(got[0], emulated(mlp, 1, MLP_SPECS, WHOLE)(x, *weights))
    # One axis emulated, the other of devices.
    half = jax.shard_map(
        inner,
        mesh=mesh_of(2, "dp"),
        in_specs=(P("dp"), *[WHOLE] * 5),
        out_specs=(P("dp"), WHOLE, P("dp")),
        check_vma=False,
    )
    assert_bitwise_equal(jax.jit(half)(x, *values), got)


# The twin ------------------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_twin_plain_dots_and_psum_have_other_bits(rng, ranks):
    """An emulation shows what a program does to the bits; it does not make them the same."""
    x, down = some(rng, np.float32, 65, DIM), some(rng, np.float32, DIM, 24 * COLUMNS)
    gate, up = some(rng, np.float32, 2, 24 * COLUMNS, DIM)

    def plain(x, gate, up, down):
        return lax.psum(jnp.dot(jax.nn.silu(jnp.dot(x, gate.T)) * jnp.dot(x, up.T), down.T), "tp")

    def invariant(x, gate, up, down):
        layer = {"axis_name": "tp", "contract": Contract(leaves=24)}
        gated = swiglu(column_parallel(x, gate, **layer), column_parallel(x, up, **layer))
        return row_parallel(gated, down, **layer)

    specs = (WHOLE, SPLIT, SPLIT, P(None, "tp"))
    many, one = (emulated(plain, n, specs, WHOLE)(x, gate, up, down) for n in (ranks, 1))
    np.testing.assert_allclose(many, one, rtol=1e-3, atol=1e-2)
    assert (bits(many) != bits(one)).any()
    many, one = (emulated(invariant, n, specs, WHOLE)(x, gate, up, down) for n in (ranks, 1))
    assert_bitwise_equal(many, one)


# A caller's own vmap -------------------------------------------------------------------------------------------------


def one_device(x, scale, gate, up, down, bias):
    layer = {"axis_name": None, "contract": CONTRACT}
    x = rms_norm(x, scale, eps=1e-5)
    gated = swiglu(column_parallel(x, gate, **layer), column_parallel(x, up, **layer))
    return row_parallel(gated, down, bias, **layer)


@pytest.mark.slow
@pytest.mark.invariance
@pytest.mark.parametrize("m, dtype", [(1, "bfloat16"), (3, "float32")])
def test_vmap_over_a_batch_keeps_the_bits(rng, m, dtype):
    """Forward and backward, weights shared or one for each example, two nested batches."""
    _, *weights = mlp_case(rng, m, dtype)
    x, dy = some(rng, dtype, 2, 3, m, DIM), some(rng, dtype, 2, 3, m, DIM)
    run = jax.jit(with_gradients(one_device))
    want = [[run(dy[i, j], x[i, j], *weights) for j in range(3)] for i in range(2)]
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *(jax.tree.map(lambda *r: np.stack(r), *r) for r in want))
    shared = (0, 0, *[None] * 5)
    got = jax.jit(jax.vmap(jax.vmap(with_gradients(one_device), in_axes=shared), in_axes=shared))(dy, x, *weights)
    assert_bitwise_equal(got, stacked, "shared weights")
    each = [np.stack([w] * 3) for w in weights]
    got = jax.jit(jax.vmap(with_gradients(one_device)))(dy[1], x[1], *each)
    assert_bitwise_equal(got, jax.tree.map(lambda y: y[1], stacked), "weights of their own")


@pytest.mark.invariance
def test_vmap_of_the_other_kernels(rng):
    x, w = some(rng, np.float32, 3, 5, 2, 70), some(rng, np.float32, 3, 2, 19, 70)
    q, k, v = (some(rng, np.float32, 3, *shape) for shape in ((2, 4, 6, 9), (2, 3, 70, 9), (2, 3, 70, 9)))
    positions = rng.integers(0, 70, (3, 2, 4))
    angle = some(rng, np.float32, 3, 4, 5)

    def run(x, w, q, k, v, positions, angle):
        return (
            matmul.leaf_products(x, w),
            matmul.leaf_products(x, pack(w)),
            matmul.leaf_products(x, pack(w, full=False)),
            attention(q, k, v, positions=positions, scale=0.3, kv_block=64),
            rms_norm(x, x[0, 0], eps=1e-6),
            rope(x[0, :, None, :10], angle[:2], angle[2:]),
        )

    values = x, w, q, k, v, positions, angle
    want = [jax.jit(run)(*(a[i] for a in values)) for i in range(3)]
    assert_bitwise_equal(jax.jit(jax.vmap(run))(*values), jax.tree.map(lambda *rows: np.stack(rows), *want))


@pytest.mark.invariance
@pytest.mark.parametrize("m", [1, 3])
def test_twin_products_batched_by_jax_have_other_bits(rng, m):
    """Where one operand is shared, JAX folds the batch into the other's rows; the kernel's own `vmap` does not."""
    alone, differ = jax.jit(matmul.leaf_products), []
    for size, axes in product((256, 4096), ((0, None), (None, 0))):
        x, w = some(rng, np.float32, 2, m, 1, size), some(rng, np.float32, 2, 1, 1024, size)
        values = [a if axis == 0 else a[0] for a, axis in zip((x, w), axes, strict=True)]
        one_each = [[a[i] if axis == 0 else a for a, axis in zip(values, axes, strict=True)] for i in range(2)]
        want = np.stack([alone(*pair) for pair in one_each])
        assert_bitwise_equal(jax.jit(jax.vmap(matmul.leaf_products, in_axes=axes))(*values), want)
        differ.append((bits(jax.jit(jax.vmap(matmul.cpu.leaf_products, in_axes=axes))(*values)) != bits(want)).any())
    assert any(differ)


def test_one_by_one_calls_the_kernel_with_its_own_shapes():
    shapes = set()

    def kernel(a, b):
        shapes.add((a.shape, b["b"].shape))
        return {"sum": a + b["b"]}

    f = one_by_one(kernel)
    a, b = jnp.arange(24.0).reshape(2, 3, 4), {"b": jnp.arange(12.0).reshape(3, 4)}
    assert_bitwise_equal(f(a[0], b), {"sum": a[0] + b["b"]})
    shapes.clear()
    got = jax.jit(jax.vmap(jax.vmap(f), in_axes=(0, None)))(a, b)
    assert_bitwise_equal(got, {"sum": a + b["b"]})
    assert shapes == {((4,), (4,))}


@pytest.mark.invariance
def test_without_vmap_the_program_is_the_same(rng):
    """The wrapper leaves no trace in what XLA is given."""
    x, w = some(rng, np.float32, 3, 2, 9), some(rng, np.float32, 2, 5, 9)
    texts = [
        jax.jit(lambda x, w, f=f: f(x, w)).lower(x, w).as_text()
        for f in (matmul.leaf_products, matmul.cpu.leaf_products)
    ]
    assert texts[0] == texts[1]


# What emulate itself does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_slices_and_specs(rng, ranks):
    """Any dimension, whole subtrees, integers and keys; under ``jit`` as well."""
    tree = {"a": some(rng, np.float32, 4, 6, 2), "b": [rng.integers(0, 9, (6, 6)), True]}
    key = jax.random.key(7)

    def run(tree, columns, key, keys):
        rank = lax.axis_index("tp")
        assert tree["a"].shape == (4, 6, 2) and columns["a"].shape == (4, 6 // ranks, 2)
        gathered = tree_all_gather(columns["a"], "tp", gather_dimension=1)
        return {"a": columns["a"], "rank": rank[None]}, (gathered, tree["b"], key, keys)

    specs = (WHOLE, {"a": P(None, "tp", None), "b": P(("tp",))}, WHOLE, SPLIT)
    columns = {"a": tree["a"], "b": tree["b"][:1]}
    out = ({"a": P(None, "tp"), "rank": SPLIT}, (WHOLE, WHOLE, WHOLE, SPLIT))
    f = emulated(run, ranks, specs, out)
    keys = jax.random.split(key, 6)
    for call in (f, jax.jit(f)):
        split, (gathered, b, same_key, same_keys) = call(tree, columns, key, keys)
        assert_bitwise_equal(split, {"a": tree["a"], "rank": np.arange(ranks, dtype=np.int32)})
        assert_bitwise_equal(gathered, tree["a"])
        assert_bitwise_equal(b, [tree["b"][0].astype(np.int32), True])
        assert same_key == key and (same_keys == keys).all()


def test_nothing_split():
    f = emulated(lambda x: lax.axis_index("tp")[None] * x, 4, WHOLE, SPLIT)
    assert_bitwise_equal(f(np.int32(3)), np.array([0, 3, 6, 9], np.int32))
    assert emulated(lambda: jnp.int32(1), 2, (), WHOLE)() == 1


def test_no_rows():
    x = np.zeros((0, 4), np.float32)
    assert emulated(lambda x: x, 2, P(None, "tp"), P(None, "tp"))(x).shape == (0, 4)


def test_replicas_that_differ():
    def run(x):
        rank = lax.axis_index("tp")
        return {"sign": jnp.where(rank == 2, -x, x), "same": x, "split": x, "complex": x + 1j * (rank // 3)}

    out = {"sign": WHOLE, "same": WHOLE, "split": SPLIT, "complex": WHOLE}
    with pytest.raises(ValueError, match=r"^emulate: 2 problems") as error:
        emulated(run, 4, WHOLE, out)(np.zeros(3, np.float32))
    # Zeros of another sign are other bits.
    assert "output['sign'] has a spec P(), the same on all ranks, but ranks [2] differ from rank 0" in str(error.value)
    assert "output['complex'] has a spec P(), the same on all ranks, but ranks [3] differ" in str(error.value)
    for unchecked in (emulated(run, 4, WHOLE, out, check_replicas=False), jax.jit(emulated(run, 4, WHOLE, out))):
        got = unchecked(np.zeros(3, np.float32))
        assert_bitwise_equal(got["sign"], np.zeros(3, np.float32))
        assert got["split"].shape == (12,)
    nan = emulated(lambda x: x, 2, WHOLE, WHOLE)(np.float32(np.nan))
    assert np.isnan(nan)


@pytest.mark.parametrize(
    "options, lines",
    [
        ({"ranks": 0}, ["ranks = 0 is not a positive integer"]),
        ({"ranks": 2.0, "axis_name": ""}, ["ranks = 2.0 is not", "axis_name = '' is not the name of an axis"]),
        (
            {"in_specs": (P("dp"), "tp", {"w": P(("tp", "dp"))})},
            [
                "in_specs[0] = P('dp') names ['dp']; the emulated axis is 'tp' alone",
                "in_specs[1] = 'tp' is not a PartitionSpec",
                "in_specs[2]['w'] = P(('tp', 'dp')) names ['dp']",
            ],
        ),
        ({"out_specs": [P(), P("x")]}, ["out_specs[1] = P('x') names ['x']"]),
    ],
)
def test_wrong_options(options, lines):
    with pytest.raises(ValueError, match=r"^emulate: ") as error:
        emulate(lambda x: x, **{"ranks": 2, "in_specs": SPLIT, "out_specs": SPLIT, **options})
    _, *found = str(error.value).splitlines()
    assert len(found) == len(lines)
    for line in lines:
        assert line in str(error.value)


def test_wrong_arguments_are_all_listed():
    f = emulated(lambda x, y: x, 3, (P(None, "tp"), SPLIT), SPLIT)
    with pytest.raises(ValueError, match=r"^emulate: 3 problems") as error:
        f({"w": np.ones((3, 4)), "b": np.ones(3)}, np.ones((5, 3)))
    for line in (
        "argument[0]['w'] has shape (3, 4): dimension 1 is not a multiple of the 3 ranks",
        "argument[0]['b'] has shape (3,), fewer dimensions than its spec P(None, 'tp')",
        "argument[1] has shape (5, 3): dimension 0 is not a multiple of the 3 ranks",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="the arguments do not have the structure of their specs"):
        f(np.ones(3))
    with pytest.raises(ValueError, match="the outputs do not have the structure of their specs"):
        emulated(lambda x: (x, x), 3, SPLIT, (SPLIT,) * 3)(np.ones(3))
    with pytest.raises(ValueError, match=r"output\[1\] has shape \(\), fewer dimensions than its spec"):
        emulated(lambda x: (x, x[0]), 3, SPLIT, SPLIT)(np.ones(3))


def test_no_gradient_around_the_emulation():
    f = emulated(lambda x: tree_psum(x, "tp", tree=TREE), 4, SPLIT, WHOLE)
    with pytest.raises(NotImplementedError, match="take gradients inside the emulated program"):
        jax.grad(lambda x: f(x).sum())(jnp.ones((8, 3)))


def test_more_ranks_than_leaves_is_refused_as_on_a_mesh():
    with pytest.raises(ValueError, match="axis 'tp' has 16 ranks but the tree only 8 leaves"):
        emulated(lambda x: tree_psum(x, "tp", tree=TREE), 16, SPLIT, WHOLE)(np.ones((16, 3), np.float32))
