"""Sampling against float64: the same noise from an independent threefry, the same cuts, the same token."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tbik_jax.engine import Sampling
from tbik_jax.engine.sampling import _gumbel, sample

GREEDY = Sampling()
gumbel = jax.jit(_gumbel, static_argnums=0)


def threefry(key: tuple[np.ndarray, np.ndarray], counter: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Threefry-2x32 with 20 rounds, from the paper (Salmon et al. 2011)."""
    keys = [np.asarray(word, np.uint32) for word in key]
    keys.append(keys[0] ^ keys[1] ^ np.uint32(0x1BD11BDA))
    x, y = (np.asarray(word, np.uint32) + k for word, k in zip(counter, keys, strict=False))
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def noise(seeds: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    """Standard Gumbel noise ``[B, size]`` in float64, keyed by (seed, position), counted by index."""
    words, _ = threefry((seeds[:, None], positions[:, None]), (np.arange(size)[None], np.zeros((1, size))))
    return -np.log(-np.log(((words >> np.uint32(9)).astype(np.float64) + 0.5) / 2**23))


def kept(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """``(scaled, mask)``: logits by temperature, and which tokens the cuts leave; one token after the other."""
    scaled = logits.astype(np.float64) / sampling.temperature
    mask = np.zeros(scaled.shape, bool)
    for row, keep in zip(scaled, mask, strict=True):
        order = np.argsort(-row, kind="stable")[: sampling.top_k or None]
        p = np.exp(row[order] - row[order[0]])
        p /= p.sum()
        reached = 0.0
        for token, probability in zip(order, p, strict=True):
            if reached >= sampling.top_p:
                break
            assert sampling.top_p == 1.0 or abs(reached - sampling.top_p) > 1e-6, "too close to tell in float32"
            keep[token] = True
            reached += probability
    return scaled, mask


def draw(logits, seeds, positions, sampling):
    return np.asarray(jax.jit(sample, static_argnums=3)(logits, seeds, positions, sampling))


def requests(count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    return (
        generator.integers(0, 2**32, count, dtype=np.uint32),
        generator.integers(0, 8192, count).astype(np.int32),
    )


# Noise ---------------------------------------------------------------------------------------------------------------


def test_the_oracle_has_the_published_values():
    # Known answers of the Random123 distribution.
    for key, counter, answer in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        words = [[np.array([word], np.uint32) for word in pair] for pair in (key, counter)]
        assert tuple(int(word[0]) for word in threefry(*words)) == answer


def test_noise_is_keyed_by_seed_position_and_index_alone():
    seeds, positions = requests(5)
    whole = np.asarray(gumbel(259, seeds, positions))
    np.testing.assert_allclose(whole, noise(seeds, positions, 259), rtol=1e-5, atol=1e-6)
    assert np.array_equal(gumbel(100, seeds, positions), whole[:, :100]), "the size of the vocabulary shows"
    assert np.array_equal(gumbel(259, seeds[2:3], positions[2:3]), whole[2:3]), "other requests show"
    assert np.unique(whole).size > 0.99 * whole.size


def test_no_global_flag_changes_the_noise():
    seeds, positions = requests(3)
    want = np.asarray(gumbel(259, seeds, positions))
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        assert np.array_equal(gumbel(259, seeds, positions), want)


def test_the_largest_draw_is_finite():
    # Here the first 24 bits of a word are all ones; as 1 - 2**-25 in float32 they would round to 1.
    seed, position, index = np.array([18], np.uint32), np.array([85], np.int32), 200
    words, _ = threefry((seed[:, None], position[:, None]), (np.arange(259)[None], np.zeros((1, 259))))
    assert words[0, index] >> np.uint32(8) == 2**24 - 1
    assert np.isfinite(gumbel(259, seed, position)).all()
    logits = np.zeros((1, 259), np.float32)
    logits[0, 5] = 50.0
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)):
        assert draw(logits, seed, position, sampling).tolist() == [5]


# Tokens --------------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lower_index_of_equals():
    logits = np.array([[0.0, 3.0, -1.0, 3.0], [-0.0, 0.0, -1.0, -2.0], [1.0, 1.0, 1.0, 1.0], [-5.0, -6.0, -4.0, -4.0]])
    tokens = draw(logits.astype(np.float32), *requests(4), GREEDY)
    assert tokens.tolist() == [1, 0, 0, 2]
    assert tokens.dtype == np.int32


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(2.5),
        Sampling(1.0, top_k=1),
        Sampling(0.8, top_k=12),
        Sampling(1.0, top_p=0.6),
        Sampling(1.7, top_p=0.9),
        Sampling(1.2, top_k=20, top_p=0.7),
    ],
    ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}",
)
def test_tokens_against_float64(rng, sampling):
    count, size = 64, 259
    logits = (3 * rng.standard_normal((count, size))).astype(np.float32)
    seeds, positions = requests(count)
    scaled, mask = kept(logits, sampling)
    total = np.where(mask, scaled + noise(seeds, positions, size), -np.inf)
    second, best = np.sort(total, axis=-1)[:, -2:].T
    assert (best - second).min() > 1e-4, "a choice that float32 may round the other way; take other logits"
    assert draw(logits, seeds, positions, sampling).tolist() == total.argmax(-1).tolist()


def support(probabilities: list[float], sampling: Sampling) -> set[int]:
    logits = np.log(np.tile(np.array(probabilities, np.float32), (2000, 1)))
    return set(draw(logits, np.arange(2000, dtype=np.uint32), np.full(2000, 3, np.int32), sampling).tolist())


@pytest.mark.parametrize(
    "sampling, tokens",
    [
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=2), {1, 3}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=0.49), {3}),
        (Sampling(1.0, top_p=0.51), {1, 3}),
        (Sampling(1.0, top_p=0.81), {1, 2, 3}),
        # Of the two largest the first has 0.5 / 0.8 = 0.625: the nucleus counts what top_k left.
        (Sampling(1.0, top_k=2, top_p=0.62), {3}),
        (Sampling(1.0, top_k=2, top_p=0.63), {1, 3}),
        # A square root: 0.36, 0.28, 0.20, 0.16 of the whole.
        (Sampling(2.0, top_p=0.5), {1, 3}),
    ],
    ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}" if isinstance(s, Sampling) else None,
)
def test_which_tokens_can_come(sampling, tokens):
    # All of them come within 2000 draws: the rarest is missed with a probability of 0.95 ** 2000.
    assert support([0.05, 0.3, 0.15, 0.5], sampling) == tokens


def test_equals_of_the_last_one_kept_are_kept():
    assert support([0.2, 0.2, 0.2, 0.4], Sampling(1.0, top_k=2)) == {0, 1, 2, 3}
    assert support([0.2, 0.2, 0.2, 0.4], Sampling(1.0, top_p=0.5)) == {0, 1, 2, 3}


# The 0.999 quantile of chi-square is 37.7 for 15 degrees of freedom and 18.5 for 4.
@pytest.mark.parametrize(
    "sampling, limit", [(Sampling(1.0), 37.7), (Sampling(0.6), 37.7), (Sampling(1.0, top_k=5), 18.5)]
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_frequencies(rng, sampling, limit, varied):
    draws, size = 20_000, 16
    logits = rng.standard_normal((1, size)).astype(np.float32)
    scaled, mask = kept(logits, sampling)
    p = np.where(mask[0], np.exp(scaled[0]), 0.0)
    p /= p.sum()
    counting, fixed = np.arange(draws, dtype=np.uint32), np.full(draws, 11, np.uint32)
    seeds, positions = (counting, fixed) if varied == "seed" else (fixed, counting)
    tokens = draw(np.repeat(logits, draws, axis=0), seeds, positions.astype(np.int32), sampling)
    found = np.bincount(tokens, minlength=size)
    assert found[p == 0].sum() == 0
    wanted = draws * p[p > 0]
    assert (((found[p > 0] - wanted) ** 2) / wanted).sum() < limit


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9), Sampling(0.9, top_k=30, top_p=0.9)])
def test_a_row_depends_on_itself_alone(rng, sampling):
    logits = rng.standard_normal((9, 259)).astype(np.float32)
    seeds, positions = requests(9)
    together = draw(logits, seeds, positions, sampling)
    alone = [draw(*(a[i : i + 1] for a in (logits, seeds, positions)), sampling)[0] for i in range(9)]
    assert together.tolist() == alone
    order = np.random.default_rng(1).permutation(9)
    assert draw(logits[order], seeds[order], positions[order], sampling).tolist() == together[order].tolist()


def test_another_seed_or_position_is_another_draw():
    logits = np.zeros((64, 259), np.float32)
    seeds, positions = np.full(64, 2**32 - 1, np.uint32), np.full(64, 17, np.int32)
    assert np.unique(draw(logits, seeds, positions, Sampling(1.0))).size == 1
    # 64 of 259 at random: 57 different ones are expected.
    assert np.unique(draw(logits, np.arange(64, dtype=np.uint32), positions, Sampling(1.0))).size > 45
    assert np.unique(draw(logits, seeds, np.arange(64, dtype=np.int32), Sampling(1.0))).size > 45
    assert np.unique(draw(logits, np.arange(64, dtype=np.uint32), positions, GREEDY)).size == 1


def test_the_lowest_temperature_is_all_but_greedy(rng):
    logits = (100 * rng.standard_normal((32, 259))).astype(np.float32)
    seeds, positions = requests(32)
    assert draw(logits, seeds, positions, Sampling(1e-6)).tolist() == logits.argmax(-1).tolist()


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [-0.5, float("nan"), float("inf"), 1e-7, 1e-40])
def test_temperature(temperature):
    with pytest.raises(
        ValueError, match=f"temperature = {temperature} is neither 0 .greedy. nor a number from 1e-06 on"
    ):
        Sampling(temperature)


def test_all_that_is_wrong_is_listed():
    with pytest.raises(ValueError, match="Sampling: 3 problems") as error:
        Sampling(-1.0, top_k=-2, top_p=0.0)
    assert str(error.value) == (
        "Sampling: 3 problems\n"
        "  - temperature = -1.0 is neither 0 (greedy) nor a number from 1e-06 on, below which logits would overflow\n"
        "  - top_k = -2 is not an integer >= 0; 0 keeps all tokens\n"
        "  - top_p = 0.0 is outside (0, 1]"
    )


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.0001, float("nan")])
def test_top_p(top_p):
    with pytest.raises(ValueError, match=rf"top_p = {top_p} is outside \(0, 1\]"):
        Sampling(1.0, top_p=top_p)


def test_top_k_is_an_integer():
    with pytest.raises(ValueError, match=r"top_k = 2.5 is not an integer >= 0"):
        Sampling(1.0, top_k=2.5)
