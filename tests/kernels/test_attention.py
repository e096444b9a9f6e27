"""Attention: a query of a head sees its keys and values; not the chunk, the batch, the cache or the heads beside it.

One list of tests for all families; a family that is not this process's is skipped.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tbik_jax.kernels import backend
from tbik_jax.kernels.attention import attention, hopper, paged_attention, unfused
from tbik_jax.kernels.attention.hopper import DecodeTiles, PrefillTiles, decode, formula, prefill
from tbik_jax.testing import assert_bitwise_equal, bits

HEADS, KV_HEADS = 6, 2


def family() -> str:
    with contextlib.suppress(NotImplementedError):
        return backend.family()
    return "none"


on_the_cpu = pytest.mark.skipif(family() != "cpu", reason=f"the default backend is {jax.default_backend()}, not a CPU")
on_the_card = pytest.mark.skipif(
    family() != "sm90", reason=f"needs a Hopper GPU; the default backend is {jax.default_backend()}"
)
interpreted = pytest.mark.skipif(
    jax.default_backend() != "cpu" or tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12),
    reason=f"Mosaic GPU's interpreter runs these kernels on CPUs from JAX 0.12 on; this is {jax.__version__} on "
    f"{jax.default_backend()}",
)


class Case(NamedTuple):
    dim: int
    dtype: str
    length: int
    kv_block: int
    chunks: tuple[int, ...]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A family's own parameters."""
    for name in ("case", "precision"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, getattr(metafunc.cls, f"{name}s"), ids=lambda x: "-".join(map(str, x)))


def inputs(
    rng: np.random.Generator, batch: int, length: int, dim: int, dtype: Any = np.float32, heads: int = HEADS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``q``, ``k``, ``v`` of a whole sequence, and its positions; scores spread over several units."""
    q = 2 * rng.standard_normal((batch, length, heads, dim))
    k, v = rng.standard_normal((2, batch, KV_HEADS, length, dim))
    positions = np.broadcast_to(np.arange(length), (batch, length))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), positions


def run_with(dim: int, kv_block: int = 64, **options: Any) -> Any:
    """A fresh compiled attention; compiled once per shape."""

    @jax.jit
    def run(q, k, v, positions):
        return attention(q, k, v, positions=positions, scale=dim**-0.5, kv_block=kv_block, **options)

    return run


def longer(x: np.ndarray, length: int, fill: float) -> np.ndarray:
    """A cache of ``length`` entries that begins with ``x`` and holds garbage behind."""
    out = np.full((*x.shape[:2], length, x.shape[3]), fill, x.dtype)
    out[:, :, : x.shape[2]] = x
    return out


def in_pages(rng: np.random.Generator, page: int, *caches: np.ndarray) -> tuple[np.ndarray, ...]:
    """``(page_table, pages of each cache)``, pages in any order, with more of them than are used, full of garbage."""
    batch, heads, length, dim = caches[0].shape
    count = -(-length // page)
    total = batch * count + 3
    table = rng.permutation(total)[: batch * count].reshape(batch, count).astype(np.int32)
    found = [table]
    for x in caches:
        x = longer(x, count * page, 1e4).reshape(batch, heads, count, page, dim).swapaxes(1, 2)
        pages = np.full((total, heads, page, dim), -1e4, x.dtype)
        pages[table.ravel()] = x.reshape(-1, heads, page, dim)
        found.append(pages)
    return tuple(found)


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention in float64, and the same of ``|v|``."""
    q, k, v = (np.asarray(a).astype(np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[1], axis=1) for a in (k, v))
    s = np.einsum("bthd,bhsd->bhts", q, k) * scale
    s = np.where(np.arange(k.shape[2]) <= positions[:, None, :, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("bhts,bhsd->bthd", p, v), np.einsum("bhts,bhsd->bthd", p, np.abs(v))


class Attention:
    """What holds in every family. ``dim``, ``dtype`` and ``kv_block`` are of the tests that vary something else."""

    cases: tuple[Case, ...]
    precisions: tuple[tuple[int, str], ...]
    dim: int
    dtype: str
    kv_block: int
    #: Keys whose results pass several blocks, and splits where there are any.
    long: int

    def draw(self, rng: np.random.Generator, batch: int, length: int, **options: Any) -> Any:
        return inputs(rng, batch, length, self.dim, self.dtype, **options)

    def run(self, **options: Any) -> Any:
        return run_with(self.dim, self.kv_block, **options)

    # Bits --------------------------------------------------------------------------------------------------------------

    @pytest.mark.invariance
    def test_prefill_chunks_and_decode_agree(self, rng, case):
        """Chunks of one query are decoding. Every chunk sees a cache that is filled as far as its last query only."""
        q, k, v, positions = inputs(rng, 2, case.length, case.dim, case.dtype)
        run = run_with(case.dim, case.kv_block)
        whole = np.asarray(run(q, k, v, positions))
        garbage = np.array(6e4, case.dtype)  # finite in float16 as well
        for chunk in case.chunks:
            for start in self.starts(case.length, chunk):
                part = slice(start, start + chunk)
                filled_k, filled_v = k.copy(), v.copy()
                filled_k[:, :, part.stop :] = filled_v[:, :, part.stop :] = garbage
                got = run(q[:, part], filled_k, filled_v, positions[:, part])
                assert_bitwise_equal(got, whole[:, part], f"queries {part}")

    def starts(self, length: int, chunk: int) -> list[int]:
        """Chunks one after the other; of a long sequence, those that begin or end around a block's boundary."""
        if length <= 300:
            return [min(start, length - chunk) for start in range(0, length, chunk)]
        around = [block + step for block in range(0, length, 128) for step in (-1, 0, 1, -chunk, 1 - chunk)]
        return sorted({min(max(0, start), length - chunk) for start in (*around, 300, length)})

    @pytest.mark.slow
    @pytest.mark.invariance
    def test_the_caches_length_and_what_it_holds_behind_cannot_be_seen(self, rng):
        """Up to 19 blocks of 64: more than 16 are added in a loop."""
        q, k, v, positions = self.draw(rng, 2, 100)
        run = self.run()
        want = np.asarray(run(q, k, v, positions))
        for length, fill in ((128, 0.0), (128, -1e30), (384, 1e30), (1000, 0.0), (1001, 1.0), (1200, 1e30)):
            got = run(q, longer(k, length, fill), longer(v, length, -fill), positions)
            assert_bitwise_equal(got, want, f"cache of {length} with {fill}")
            last = run(q[:, 99:], longer(k, length, fill), longer(v, length, fill), positions[:, 99:])
            assert_bitwise_equal(last, want[:, 99:], f"the last query, cache of {length} with {fill}")

    @pytest.mark.invariance
    @pytest.mark.parametrize("queries", [1, 9])
    def test_sequences_of_a_batch_do_not_see_each_other(self, rng, queries):
        """Each at positions of its own, as a server batches them."""
        q, k, v, _ = self.draw(rng, 17, self.long)
        starts = rng.integers(0, self.long - queries, 17)
        starts[:5] = 0, 3, 64, 127, 128
        positions = starts[:, None] + np.arange(queries)
        q = np.take_along_axis(q, positions[:, :, None, None], axis=1)
        run = self.run()
        together = np.asarray(run(q, k, v, positions))
        for rows in (slice(0, 1), slice(3, 4), slice(16, 17), slice(2, 5), slice(0, 16)):
            assert_bitwise_equal(run(q[rows], k[rows], v[rows], positions[rows]), together[rows], f"sequences {rows}")

    @pytest.mark.slow
    @pytest.mark.invariance
    @pytest.mark.parametrize("queries", [1, 9, 41])
    def test_heads_do_not_see_each_other(self, rng, queries):
        q, k, v, positions = self.draw(rng, 2, 41)
        q, positions = q[:, -queries:], positions[:, -queries:]
        together = np.asarray(self.run()(q, k, v, positions))
        run = self.run()
        assert_bitwise_equal(run(q[:, :, 4:5], k[:, 1:], v[:, 1:], positions), together[:, :, 4:5], "one head")
        assert_bitwise_equal(run(q[:, :, :3], k[:, :1], v[:, :1], positions), together[:, :, :3], "one group")
        # A KV head repeated for two of its query heads, as on a mesh with more ranks than KV heads.
        for heads in ([0, 1, 2, 3, 4, 5], [5], [1, 2, 3], [4, 0]):
            of = jnp.array([head // (HEADS // KV_HEADS) for head in heads])
            got = self.run(kv_head_of=of)(q[:, :, heads], k, v, positions)
            assert_bitwise_equal(got, together[:, :, heads], f"heads {heads} by kv_head_of")

    @pytest.mark.invariance
    @pytest.mark.parametrize("group", [1, 8, 9, 16])
    def test_any_number_of_heads_per_kv_head(self, rng, group):
        q, k, v, positions = self.draw(rng, 2, 41, heads=KV_HEADS * group)
        run = self.run()
        whole = np.asarray(run(q, k, v, positions))
        for t in (0, 7, 40):
            assert_bitwise_equal(run(q[:, t : t + 1], k, v, positions[:, t : t + 1]), whole[:, t : t + 1], f"query {t}")

    @pytest.mark.slow
    @pytest.mark.invariance
    def test_queries_come_in_any_order(self, rng):
        q, k, v, positions = self.draw(rng, 2, self.long)
        run = self.run()
        whole = np.asarray(run(q, k, v, positions))
        order = np.stack([rng.permutation(self.long) for _ in range(2)])
        got = run(np.take_along_axis(q, order[:, :, None, None], axis=1), k, v, order)
        assert_bitwise_equal(got, np.take_along_axis(whole, order[:, :, None, None], axis=1))

    @pytest.mark.slow
    @pytest.mark.invariance
    @pytest.mark.parametrize("page", [8, 16, 64, 128, 256])
    def test_pages_cannot_be_seen(self, rng, page):
        q, k, v, positions = self.draw(rng, 2, self.long)
        want = np.asarray(self.run()(q, k, v, positions))
        table, k_pages, v_pages = in_pages(rng, page, k, v)

        @jax.jit
        def run(q, k_pages, v_pages, table, positions, kv_head_of=None):
            options = {"scale": self.dim**-0.5, "kv_block": self.kv_block, "kv_head_of": kv_head_of}
            return paged_attention(q, k_pages, v_pages, table, positions=positions, **options)

        assert_bitwise_equal(run(q, k_pages, v_pages, table, positions), want)
        for t in (0, 127, 128, self.long - 1):
            one = slice(t, t + 1)
            got = run(q[:, one], k_pages, v_pages, table, positions[:, one])
            assert_bitwise_equal(got, want[:, one], f"query {t}")
        of = jnp.array([1, 0, 0])
        assert_bitwise_equal(run(q[:, :, [3, 0, 2]], k_pages, v_pages, table, positions, of), want[:, :, [3, 0, 2]])

    @pytest.mark.invariance
    def test_a_layer_of_a_stacked_cache_is_a_page(self, rng):
        q, k, v, positions = self.draw(rng, 2, 41)
        want = self.run()(q, k, v, positions)
        k, v = (np.stack([np.full(longer(x, 256, 0).shape, 7, x.dtype), longer(x, 256, 0)]) for x in (k, v))

        @jax.jit
        def run(q, k, v, positions, layer):
            k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
            table = (layer * 2 + jnp.arange(2))[:, None]
            options = {"scale": self.dim**-0.5, "kv_block": self.kv_block}
            return paged_attention(q, k, v, table, positions=positions, **options)

        assert_bitwise_equal(run(q, k, v, positions, 1), want)

    @pytest.mark.invariance
    def test_jit_and_what_surrounds_it_cannot_be_seen(self, rng):
        q, k, v, positions = self.draw(rng, 1, 33)
        call = partial(attention, scale=0.125, kv_block=self.kv_block)
        want = np.asarray(call(*map(jnp.asarray, (q, k, v)), positions=jnp.asarray(positions)))
        scale, rest = rng.uniform(0.5, 2, (2, 1, 33, HEADS, self.dim)).astype(q.dtype)
        inside = jax.jit(lambda q, k, v, at, scale, rest: call(q * scale, k, v, positions=at) + rest)
        assert_bitwise_equal(jax.jit(call)(q, k, v, positions=positions), want, "jit")
        # Constants: XLA may not evaluate the products itself.
        assert_bitwise_equal(
            jax.jit(lambda: call(*map(jnp.asarray, (q, k, v)), positions=positions))(), want, "constants"
        )
        scaled = np.asarray(jax.jit(call)(q * scale, k, v, positions=positions))
        assert_bitwise_equal(inside(q, k, v, positions, scale, rest), scaled + rest, "fused")

    @pytest.mark.invariance
    @pytest.mark.parametrize("queries", [1, 33])
    def test_vmap_and_shard_map_cannot_be_seen(self, rng, queries):
        q, k, v, positions = self.draw(rng, 3, 33)
        q, positions = q[:, -queries:], positions[:, -queries:]
        run = self.run()
        want = np.asarray(run(q, k, v, positions))
        each = jax.vmap(lambda *x: run(*(a[None] for a in x))[0])(q, k, v, positions)
        assert_bitwise_equal(each, want, "vmap over the batch")
        mesh = Mesh(jax.devices()[:1], ("tp",))
        specs = P(None, None, "tp"), P(None, "tp"), P(None, "tp"), P()
        rank = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(None, None, "tp")))
        assert_bitwise_equal(rank(q, k, v, positions), want, "shard_map")

    def test_a_zero_has_no_sign(self):
        """Blocks of exact zeros may be added or not; 0 is +0 either way."""
        q = k = np.ones((1, 1, 1, self.dim), self.dtype)
        for length in (1, 200):
            cache = np.full((1, 1, length, self.dim), -0.0, self.dtype)
            y = self.run()(q, np.broadcast_to(k, cache.shape), cache, np.zeros((1, 1), np.int32))
            assert_bitwise_equal(y, np.zeros_like(q))

    @pytest.mark.invariance
    def test_twin_plain_attention_tells_prefill_from_decode(self, rng):
        q, k, v, _ = self.draw(rng, 2, 137)
        k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))

        @jax.jit
        def plain(q, k, v, positions):
            s = jnp.einsum("bthd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * self.dim**-0.5
            s = jnp.where(jnp.arange(k.shape[2]) <= positions[:, None], s, -jnp.inf)
            return jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(s, -1), v.astype(jnp.float32))

        at = np.arange(137)
        whole = np.asarray(plain(q, k, v, at))
        assert any(
            (bits(plain(q[:, t : t + 1], k, v, at[t : t + 1])) != bits(whole[:, t : t + 1])).any() for t in (70, 136)
        )

    # Values ------------------------------------------------------------------------------------------------------------

    def tolerance(self, dtype: str, keys: int, v: np.ndarray, want: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def test_accuracy(self, rng, precision):
        """Against softmax attention in float64 on the same, already rounded inputs."""
        dim, dtype = precision
        length = max(137, self.long if dtype != "float32" else 0)
        q, k, v, positions = inputs(rng, 2, length, dim, dtype)
        got = np.asarray(run_with(dim, self.kv_block)(q, k, v, positions))
        assert got.dtype == np.dtype(dtype)
        want, magnitude = reference(q, k, v, positions, dim**-0.5)
        error = np.abs(got.astype(np.float64) - want)
        assert (error <= self.tolerance(dtype, length, np.abs(v).max().astype(np.float64), want, magnitude)).all()

    def test_scale_is_what_the_caller_says(self, rng):
        q, k, v, positions = self.draw(rng, 1, 137)
        want = self.run()(q, k, v, positions)
        doubled = jax.jit(partial(attention, scale=2 * self.dim**-0.5, kv_block=self.kv_block))
        assert_bitwise_equal(doubled((q / 2).astype(q.dtype), k, v, positions=positions), want)


_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@on_the_cpu
class TestCpu(Attention):
    cases = (
        Case(16, "float32", 137, 64, (1, 7)),
        Case(32, "bfloat16", 137, 64, (1, 64)),
        Case(64, "float32", 289, 128, (1, 7, 64, 256)),
        Case(64, "float16", 73, 64, (1, 7)),
        Case(80, "float32", 137, 64, (1, 64)),
        Case(128, "bfloat16", 289, 256, (1, 256)),
        Case(256, "float32", 137, 128, (1, 7)),
    )
    precisions = ((16, "float32"), (128, "float32"), (80, "bfloat16"), (128, "bfloat16"), (80, "float16"))
    dim, dtype, kv_block, long = 64, "float32", 64, 137

    def tolerance(self, dtype, keys, v, want, magnitude):
        """Sums of a few hundred terms in float32, seen to err by up to 7e-7 of the largest value; then the last rounding."""
        smallest = 2.0**-14 if dtype == "float16" else 0.0  # what is subnormal there becomes zero
        return 2e-6 * v + np.maximum(smallest, 1.01 * _ROUNDOFF[dtype] * np.abs(want))

    @pytest.mark.invariance
    @pytest.mark.parametrize("queries_a_piece", [1, 5, 8])
    def test_long_prompts_go_in_pieces(self, rng, monkeypatch, queries_a_piece):
        q, k, v, positions = inputs(rng, 2, 41, 32)
        want = run_with(32)(q, k, v, positions)
        monkeypatch.setattr(unfused, "_SCORE_BYTES", 4 * 2 * HEADS * 64 * queries_a_piece)
        run = run_with(32)
        assert_bitwise_equal(run(q, k, v, positions), want)
        assert "while" in run.lower(q, k, v, positions).as_text()  # it did go in pieces

    def test_blocks_are_what_the_caller_says(self, rng):
        """Numerics-bearing: other blocks, other order."""
        q, k, v, positions = inputs(rng, 1, 137, 32)
        assert (bits(run_with(32, 128)(q, k, v, positions)) != bits(run_with(32, 64)(q, k, v, positions))).any()

    @pytest.mark.parametrize("dim, kv_block", [(320, 64), (64, 512), (192, 256), (256, 192)])
    def test_what_it_cannot_do_invariantly(self, dim, kv_block):
        shapes = {"q": jnp.ones((2, 3, 4, dim)), "k": jnp.ones((2, 2, 5, dim)), "v": jnp.ones((2, 2, 5, dim))}
        with pytest.raises(NotImplementedError, match=rf"head_dim {dim}\b.* 256"):
            call(**shapes, kv_block=kv_block)


@on_the_card
@pytest.mark.gpu
class TestHopper(Attention):
    cases = (
        Case(128, "bfloat16", 1300, 128, (1, 7, 64, 256)),
        Case(64, "bfloat16", 1300, 128, (1, 64)),
        Case(128, "float16", 1300, 128, (1, 256)),
        Case(64, "float16", 289, 128, (1, 7)),
        Case(64, "float32", 289, 128, (1, 64)),
        Case(80, "float32", 137, 128, (1, 7)),
    )
    precisions = ((64, "bfloat16"), (128, "bfloat16"), (64, "float16"), (128, "float16"), (80, "float32"))
    dim, dtype, kv_block, long = 128, "bfloat16", 128, 1100

    def tolerance(self, dtype, keys, v, want, magnitude):
        """The rounding of every weight, that of the result, and the hardware's exp2 of scores up to about 30."""
        if dtype == "float32":
            return 1e-5 * v
        small = keys * 2.0**-25 if dtype == "float16" else 0.0  # weights that are subnormal there
        return _ROUNDOFF[dtype] * 1.01 * (magnitude + np.abs(want)) + (1e-5 + small) * v

    @pytest.mark.invariance
    @pytest.mark.parametrize("group", [1, 4])
    def test_decode_at_every_position(self, rng, group):
        """Half of the values are -0."""
        length = 1100
        q, k, v, positions = self.draw(rng, 1, length, heads=KV_HEADS * group)
        v = np.where(rng.random(v.shape) < 0.5, v, np.array(-0.0, v.dtype))
        run = self.run()
        whole = np.asarray(run(q, k, v, positions))
        k, v = (np.broadcast_to(x, (length, *x.shape[1:])) for x in (k, v))
        for walk in (True, False):
            tiles = DecodeTiles(whole=walk)
            run = jax.jit(partial(hopper.attention, self.dim**-0.5, tiles=tiles))
            assert_bitwise_equal(run(q[0][:, None], k, v, positions.T), whole[0][:, None], str(tiles))

    @pytest.mark.invariance
    def test_tiles_and_runs_change_nothing(self, rng):
        q, k, v, positions = self.draw(rng, 3, self.long, heads=8)
        want = np.asarray(self.run()(q, k, v, positions))
        call = partial(hopper.attention, self.dim**-0.5)
        assert_bitwise_equal(jax.jit(call)(q, k, v, positions), want, "again")
        for tiles in (
            PrefillTiles(stages=1),
            PrefillTiles(together=1),
            PrefillTiles(together=3),
            PrefillTiles(blocks=7),
            PrefillTiles(stages=1, together=1),
            PrefillTiles(registers=(232, 40)),
        ):
            assert_bitwise_equal(jax.jit(partial(call, tiles=tiles))(q, k, v, positions), want, str(tiles))
        q, positions = q[:, -1:], positions[:, -1:]
        for tiles in (
            PrefillTiles(),
            DecodeTiles(slots=2),
            DecodeTiles(unroll=1, chunk=1),
            DecodeTiles(unroll=2, chunk=2),
            DecodeTiles(blocks=5),
            DecodeTiles(blocks=5, whole=True),
            DecodeTiles(whole=False),
        ):
            assert_bitwise_equal(jax.jit(partial(call, tiles=tiles))(q, k, v, positions), want[:, -1:], str(tiles))

    @pytest.mark.invariance
    @pytest.mark.parametrize("last", [62, 63, 64, 65, 126, 127, 128, 129])
    def test_queries_end_anywhere_in_a_block(self, rng, last):
        """Those of a warpgroup around its middle, or its end; the other sequences' ones elsewhere."""
        q, k, v, positions = self.draw(rng, 3, self.long)
        want = np.asarray(self.run()(q, k, v, positions))
        at = np.array([last - 63 + (last < 63), last - 63 + 512, last - 63 + 640])[:, None] + np.arange(190)
        q = np.take_along_axis(q, at[:, :, None, None], axis=1)
        want = np.take_along_axis(want, at[:, :, None, None], axis=1)
        assert_bitwise_equal(self.run()(q, k, v, at), want)

    def test_what_a_backward_pass_needs(self, rng):
        q, k, v, positions = self.draw(rng, 2, 300)
        y, lse = jax.jit(partial(hopper.attention_with_lse, self.dim**-0.5))(q, k, v, positions)
        assert_bitwise_equal(y, self.run()(q, k, v, positions))
        k = np.repeat(k.astype(np.float64), HEADS // KV_HEADS, axis=1)
        s = np.einsum("bthd,bhsd->bhts", q.astype(np.float64), k) * self.dim**-0.5
        want = np.log2(np.where(np.tril(np.ones((300, 300), bool)), np.exp(s), 0).sum(-1))
        np.testing.assert_allclose(lse, want, rtol=0, atol=1e-4)


# Schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [0, 1, 5, 1000])
@pytest.mark.parametrize(
    "pairs, rows, group", [(16, 256, 4), (64, 64, 4), (256, 32, 4), (16, 32, 8), (32, 32, 4), (3, 5, 1)]
)
def test_every_tile_has_its_turn_once_and_blocks_work_alike(heads, pairs, rows, group):
    grid, items = 132, pairs * rows
    together, turn = prefill._plan(pairs, rows, group, grid, heads)
    waves = np.arange(-(-items // grid))[:, None]
    of_blocks = waves * grid + prefill._place(waves, np.arange(grid), turn, grid)
    assert sorted(of_blocks.ravel()) == list(range(waves.size * grid))
    pair, row = prefill._walk(np.arange(items), pairs, rows, together)
    assert len({*zip(pair.tolist(), row.tolist(), strict=True)}) == items
    assert (pair.min(), pair.max(), row.min(), row.max()) == (0, pairs - 1, 0, rows - 1)
    if waves.size > 30 or (waves.size > 7 and not heads):
        work = np.append(pair + 1, np.zeros(waves.size * grid - items))[of_blocks].sum(axis=0)
        assert work.max() < (1.03 if heads else 1.015) * work.mean()


def plan_by_every_tile(pairs: int, rows: int, group: int, grid: int, heads: int) -> tuple[int, int]:
    """`prefill._plan` without a short cut: what every block has to do, tile by tile, under every turn."""
    items, blocks = pairs * rows, np.arange(grid)
    waves = np.arange(-(-items // grid))[:, None]
    sizes = [size * group for size in ([heads] if heads else 1 << np.arange(20)) if size * group < rows]
    sizes = [size for size in sizes if rows % size == 0] or [rows]
    if not heads and rows not in sizes:
        sizes.append(rows)
    best = []
    for size in sizes:
        work = np.zeros(waves.size * grid)
        work[:items] = prefill._walk(np.arange(items), pairs, rows, size)[0] + 1.5
        of_blocks = {
            turn: work[waves * grid + prefill._place(waves, blocks, turn, grid)].sum(axis=0)
            for turn in range(0, grid, max(1, grid // 32))
        }
        best.append(min((work.max(), size, turn) for turn, work in of_blocks.items()))
    enough = [plan for plan in best if plan[0] <= 1.01 * (items / grid * ((pairs - 1) / 2 + 1.5))]
    return (enough or [min(best)])[0][1:]


def test_plans_are_those_of_every_tile(rng):
    shapes = [(256, 64, 4, 132, 0), (150, 90, 5, 132, 3), (64, 256, 4, 114, 0), (97, 120, 3, 131, 0)]
    for _ in range(150):
        group, kv_heads, batch = rng.choice([1, 2, 3, 4, 5, 8]), *rng.integers(1, 9, 2)
        pairs, grid = (rng.integers(1, rng.choice(most)) for most in ([5, 20, 70], [12, 140]))
        rows = group * kv_heads * batch
        shapes.append((pairs, rows, group, min(grid, pairs * rows), rng.choice([0, 0, 1, 2, 3, 5])))
    for shape in shapes:
        shape = tuple(map(int, shape))
        assert prefill._plan(*shape) == plan_by_every_tile(*shape), shape


def test_few_heads_go_together_where_that_keeps_all_blocks_busy():
    shapes = (16, 256), (64, 64), (32, 128), (16, 32), (32, 32), (256, 32)
    assert [prefill._plan(*shape, 4, 132, 0)[0] // 4 for shape in shapes] == [16, 1, 2, 1, 2, 1]


# Interpreted ---------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.newest
@pytest.mark.parametrize(
    "queries, page, tiles",
    [
        (1, 0, DecodeTiles(chunk=2, unroll=2)),
        (1, 16, DecodeTiles(slots=3)),
        (3, 64, DecodeTiles(whole=True)),
        (70, 64, PrefillTiles(together=1)),
        (200, 256, PrefillTiles(stages=1)),
        (300, 0, PrefillTiles(together=4)),
    ],
)
def test_control_flow_in_the_interpreter(rng, interpreter, queries, page, tiles):
    """Rings, splits, masks and pages."""
    length = 1030
    q, k, v, _ = inputs(rng, 2, length, 64, jnp.bfloat16)
    q, positions = q[:, :queries], rng.integers(0, length, (2, queries))
    table, *pages = in_pages(rng, page, k, v) if page else (None, k, v)
    got = hopper.attention(0.125, *map(jnp.asarray, (q, *pages, positions)), None, table, tiles=tiles)
    assert_near(got, q, k, v, positions)


@interpreted
@pytest.mark.newest
@pytest.mark.parametrize(
    "last, other",
    [
        ((62, 63), "next"),
        ((64, 65), "far"),
        ((128, 129), "before"),
        ((190, 511), "next"),
        ((575, 576), "far"),
    ],
)
def test_queries_end_anywhere_in_the_interpreter(rng, interpreter, last, other):
    """The first warpgroup's queries end there in two sequences; the second one's are the next, or far, or come before."""
    q, k, v, _ = inputs(rng, 2, 770, 64, jnp.bfloat16, heads=KV_HEADS)
    q = q[:, :128]
    first = np.maximum(np.array(last)[:, None] - np.arange(63, -1, -1), 0)
    second = {"next": first + 64, "far": first + 180, "before": np.maximum(first - 130, 0)}[other]
    positions = np.concatenate([first, second], axis=1)
    got = hopper.attention(0.125, *map(jnp.asarray, (q, k, v, positions)), None, tiles=PrefillTiles())
    assert_near(got, q, k, v, positions)


def assert_near(got: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
    want, magnitude = reference(q, k, v, positions, 0.125)
    assert (np.abs(np.asarray(got, np.float64) - want) <= 2**-8 * 1.01 * (magnitude + np.abs(want)) + 1e-4).all()


@pytest.fixture
def interpreter(monkeypatch):
    """It knows neither Mosaic's own operations nor operands in registers."""

    def add_values(acc, p, values, meanwhile=lambda: None):
        acc = acc + jnp.dot(p.astype(jnp.float32), values[...].astype(jnp.float32))
        meanwhile()
        return acc

    def store(gmem, value, rows):
        gmem[...] = value[:rows]

    def store_rows(gmem, values, rows):
        gmem[...] = jnp.stack([x[:rows] for x in values])

    def bounds_of(positions):
        here = positions[...].reshape(2, -1)
        return here.max(), here[jax.lax.axis_index("wg") % 2].min()

    monkeypatch.setattr(backend, "multiprocessors", lambda: 3)
    monkeypatch.setattr(prefill, "_bounds_of", bounds_of)
    monkeypatch.setattr(formula, "fma", lambda a, b, c, layout: a * b + c)
    monkeypatch.setattr(formula, "add_values", add_values)
    monkeypatch.setattr(decode, "_store", store)
    monkeypatch.setattr(decode, "_store_rows", store_rows)
    with plgpu.force_gpu_interpret_mode():
        yield


# Refusals ------------------------------------------------------------------------------------------------------------


def call(**changes: Any) -> jax.Array:
    arguments = {
        "q": jnp.ones((2, 3, 4, 8)),
        "k": jnp.ones((2, 2, 5, 8)),
        "v": jnp.ones((2, 2, 5, 8)),
        "positions": jnp.zeros((2, 3), jnp.int32),
        "scale": 1.0,
        "kv_block": 64,
    } | changes
    return attention(**arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": jnp.ones((2, 3, 8))}, "q has shape (2, 3, 8), not [B, T, heads, D]"),
        ({"k": jnp.ones((2, 5, 8))}, "k has shape (2, 5, 8), not [B, kv_heads, S, D]"),
        ({"v": jnp.ones((2, 2, 6, 8))}, "k and v differ in shape: (2, 2, 5, 8) and (2, 2, 6, 8)"),
        ({"kv_block": 96}, "kv_block = 96 is not a positive multiple of 64"),
        ({"kv_block": 0}, "kv_block = 0 is not a positive multiple of 64"),
        ({"q": jnp.ones((2, 3, 4, 8), jnp.int32)}, "q is int32; use f32, bf16 or f16"),
        ({"q": jnp.ones((1, 3, 4, 8))}, "q has batch 1, k has 2"),
        ({"q": jnp.ones((2, 3, 4, 16))}, "q has head_dim 16, k has 8"),
        ({"positions": jnp.zeros((2, 4), jnp.int32)}, "positions have shape (2, 4), not (2, 3)"),
        ({"q": jnp.ones((2, 3, 5, 8))}, "5 query heads are not a multiple of 2 KV heads; pass kv_head_of"),
        ({"kv_head_of": jnp.zeros(3, jnp.int32)}, "kv_head_of has shape (3,), not (4,)"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=r"^attention: ") as error:
        call(**changes)
    assert message in str(error.value)


def test_everything_wrong_at_once():
    with pytest.raises(ValueError, match=r"^attention: 5 problems") as error:
        call(q=jnp.ones((1, 3, 5, 16)), kv_block=1)
    for message in (
        "batch 1",
        "head_dim 16",
        "kv_block = 1 ",
        "positions have shape (2, 3), not (1, 3)",
        "5 query heads",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_block": 64}, "kv_block = 64: Hopper kernels cut keys in blocks of 128; use Contract(kv_block=128)"),
        (
            {"dim": 80, "dtype": "bfloat16"},
            "head_dim 80 in bfloat16: Hopper kernels take 64 and 128; float32 takes any",
        ),
        ({"dim": 320}, "head_dim 320 is above 256"),
        ({"dtype": "float16", "scale": -1.0}, "scale = -1.0: Hopper kernels take scales above 0"),
    ],
)
def test_what_hopper_kernels_cannot_do(monkeypatch, changes, message):
    monkeypatch.setattr(backend, "family", lambda: "sm90")
    dim, dtype = changes.pop("dim", 64), changes.pop("dtype", "float32")
    arrays = {"q": jnp.ones((2, 3, 4, dim), dtype), "k": jnp.ones((2, 2, 5, dim), dtype)}
    with pytest.raises(NotImplementedError, match=r"^attention: 1 problem\n") as error:
        call(**arrays, v=arrays["k"], **({"kv_block": 128} | changes))
    assert message in str(error.value)


def test_pages_that_do_not_fit():
    q, pages = jnp.ones((2, 1, 4, 8)), jnp.ones((5, 2, 24, 8))
    options = {"positions": jnp.zeros((2, 1), jnp.int32), "scale": 1.0, "kv_block": 128}
    with pytest.raises(ValueError, match=r"^paged_attention: 4 problems") as error:
        paged_attention(q, pages, pages[:4], jnp.ones((3, 2)), **options)
    for message in (
        "k_pages and v_pages differ in shape: (5, 2, 24, 8) and (4, 2, 24, 8)",
        "page_size = 24; use 8, 16, 32, 64 or a multiple of 128",
        "page_table has shape (3, 2), not [2, most_pages]",
        "page_table is float32; use integers",
    ):
        assert message in str(error.value)


def test_what_has_no_gradient_says_so(rng):
    q, k, v, positions = (jnp.asarray(x) for x in inputs(rng, 1, 9, 16))
    table = jnp.zeros((1, 1), jnp.int32)
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 7), (0, 0))) for x in (k, v))
    with pytest.raises(NotImplementedError, match="a paged cache has no gradient; give k and v side by side"):
        jax.grad(lambda q: paged_attention(q, k, v, table, positions=positions, scale=1.0, kv_block=128).sum())(q)
