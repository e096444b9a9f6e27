"""Where heads, columns and vocabulary entries lie: an oracle that knows only which KV head a query head reads."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest

from tbik_jax.contract import Contract
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.layout import IDLE, Layout
from tbik_jax.models.random import TINY


def config_of(heads: int, kv_heads: int, ffn: int = 1536, vocabulary: int = 512) -> ModelConfig:
    return dataclasses.replace(
        TINY, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=ffn, vocab_size=vocabulary
    )


class Shape(NamedTuple):
    config: ModelConfig
    leaves: int
    max_ranks: int


SHAPES = {
    "smollm2": Shape(config_of(9, 3, 1536, 49152), 9, 9),
    "qwen3": Shape(config_of(16, 8, 3072, 151936), 16, 16),
    "ten-on-two": Shape(config_of(10, 2, 544, 259), 8, 8),
    "one-kv-head-each": Shape(config_of(8, 8), 8, 8),
    "llama": Shape(config_of(32, 8, 14336, 128256), 8, 8),
    "six-on-two": Shape(config_of(6, 2), 8, 6),
    "multi-query": Shape(config_of(12, 1), 8, 8),
    "prime": Shape(config_of(7, 7, 1536, 257), 5, 5),
    "few-entries": Shape(config_of(8, 4, 1536, 10), 8, 8),
}
LAYOUTS = [
    pytest.param(Layout(shape.config, Contract(leaves=shape.leaves), ranks), id=f"{name}-{ranks}")
    for name, shape in SHAPES.items()
    for ranks in range(1, shape.max_ranks + 1)
]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def by_rank(slots: tuple[int, ...], ranks: int) -> list[tuple[int, ...]]:
    width, rest = divmod(len(slots), ranks)
    assert rest == 0, "every rank has as many slots as any other"
    return [slots[rank * width : (rank + 1) * width] for rank in range(ranks)]


def local_heads(layout: Layout) -> list[list[int]]:
    """The query head in every place of every rank; IDLE where there is none."""
    size = layout.heads_per_leaf
    return [
        [IDLE if leaf == IDLE else leaf * size + i for leaf in slots for i in range(size)]
        for slots in by_rank(layout.slots_of(layout.heads), layout.ranks)
    ]


def check_kv_heads(layout: Layout) -> None:
    """Every query head finds the KV head of its group on its own rank, and nothing else lies there."""
    group = layout.config.num_heads // layout.config.num_kv_heads
    for rank, (heads, held) in enumerate(zip(local_heads(layout), by_rank(layout.kv_slots, layout.ranks), strict=True)):
        assert len(heads) == layout.local_heads
        assert len(held) == layout.local_kv_heads
        if layout.kv_of_head is None:
            assert layout.local_heads % layout.local_kv_heads == 0
            places = [i // (layout.local_heads // layout.local_kv_heads) for i in range(layout.local_heads)]
        else:
            places = list(layout.kv_of_head[rank])
        assert len(places) == len(heads)
        for head, place in zip(heads, places, strict=True):
            assert held[place] != IDLE, "an idle query head, too, reads a slot that holds something"
            if head != IDLE:
                assert held[place] == head // group
        needed = sorted({head // group for head in heads if head != IDLE})
        assert list(held) == needed + [IDLE] * (len(held) - len(needed)), "each once, in order, idle slots last"


@every_layout
def test_every_query_head_is_on_one_rank_in_order(layout):
    ranks = local_heads(layout)
    assert [head for heads in ranks for head in heads if head != IDLE] == list(range(layout.config.num_heads))
    held = [sum(head != IDLE for head in heads) for heads in ranks]
    assert min(held) > 0
    assert max(held) - min(held) in (0, layout.heads_per_leaf), "as even as whole leaves can be"
    for heads, count in zip(ranks, held, strict=True):
        assert heads[count:] == [IDLE] * (len(heads) - count)


@every_layout
def test_kv_heads_follow_their_query_heads(layout):
    check_kv_heads(layout)


@every_layout
@pytest.mark.parametrize("dimension", ["mlp", "vocab"])
def test_every_other_leaf_is_on_one_rank_in_order(layout, dimension):
    leaves = getattr(layout, f"{dimension}_leaves")
    ranks = by_rank(layout.slots_of(getattr(layout, dimension)), layout.ranks)
    assert [leaf for slots in ranks for leaf in slots if leaf != IDLE] == list(range(leaves))
    for slots in ranks:
        held = sum(leaf != IDLE for leaf in slots)
        assert held in (leaves // layout.ranks, leaves // layout.ranks + 1)
        assert all(leaf == IDLE for leaf in slots[held:])


def test_kv_heads_of_every_small_model_on_every_mesh():
    for kv_heads in range(1, 13):
        for group in range(1, 7):
            config = config_of(kv_heads * group, kv_heads)
            for leaves in (1, 3, 8, 16):
                contract = Contract(leaves=leaves)
                for ranks in range(1, Layout.max_ranks(config, contract) + 1):
                    check_kv_heads(Layout(config, contract, ranks))


def test_uneven_heads_worked_by_hand():
    layout = Layout(SHAPES["smollm2"].config, Contract(leaves=9), 2)
    assert layout.slots_of(layout.heads) == (0, 1, 2, 3, 4, 5, 6, 7, 8, IDLE)
    # Heads 0-2 read KV head 0, heads 3-5 KV head 1, heads 6-8 KV head 2: both ranks need the middle one.
    assert layout.kv_slots == (0, 1, 1, 2)
    assert layout.kv_of_head == ((0, 0, 0, 1, 1), (0, 1, 1, 1, 0))


def test_idle_kv_slots_worked_by_hand():
    layout = Layout(config_of(10, 2), Contract(), 3)
    assert layout.slots_of(layout.heads) == (0, 1, 2, 3, 4, 5, 6, IDLE, 7, 8, 9, IDLE)
    assert layout.kv_slots == (0, IDLE, 0, 1, 1, IDLE)
    assert layout.kv_of_head == ((0, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 0))


@pytest.mark.parametrize(
    "heads, kv_heads, even",
    [(32, 8, {1, 2, 4, 8}), (16, 8, {1, 2, 4, 8}), (8, 8, {1, 2, 4, 8}), (9, 3, {1, 3, 8}), (12, 1, set(range(1, 9)))],
)
def test_where_groups_are_even_no_table_is_needed(heads, kv_heads, even):
    # A table costs a copy of the keys and values in every layer.
    found = {r for r in range(1, 9) if Layout(config_of(heads, kv_heads), Contract(), r).kv_of_head is None}
    assert found == even


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_largest_mesh(shape):
    contract = Contract(leaves=shape.leaves)
    assert Layout.max_ranks(shape.config, contract) == shape.max_ranks
    with pytest.raises(ValueError, match=f"{shape.max_ranks + 1} tensor-parallel ranks"):
        Layout(shape.config, contract, shape.max_ranks + 1)


def test_a_mesh_larger_than_one_dimension():
    with pytest.raises(ValueError, match="Layout: 1 problem") as error:
        Layout(config_of(6, 2), Contract(), 7)
    assert str(error.value) == (
        "Layout: 1 problem\n"
        "  - 7 tensor-parallel ranks, but the 6 query heads have 6 leaves: use at most 6 ranks, or a contract with more "
        "leaves (leaves = 8 now; other bits)"
    )


@pytest.mark.parametrize("ranks", [0, 9])
def test_every_dimension_that_a_mesh_does_not_fit_is_listed(ranks):
    with pytest.raises(ValueError, match="Layout: 3 problems") as error:
        Layout(config_of(4, 2, ffn=6, vocabulary=5), Contract(), ranks)
    head, *lines = str(error.value).splitlines()
    assert head == "Layout: 3 problems"
    for line, dimension in zip(lines, ("4 query heads", "6 feed-forward columns", "5 vocabulary entries"), strict=True):
        count = dimension.split()[0]
        assert line.startswith(
            f"  - {ranks} tensor-parallel ranks, but the {dimension} have {count} leaves: use at most"
        )


@pytest.mark.parametrize(
    "heads, kv_heads, ranks, leaves",
    [
        (12, 6, 1, 6),
        (12, 6, 3, 6),
        (12, 6, 4, None),  # leaves of one head: a group is cut, and its KV head lies on two ranks
        (24, 8, 3, 8),  # a leaf is a group
        (32, 16, 3, None),  # leaves of two groups: 6, 6 and 4 KV heads, where a tree over 16 has 6, 5 and 5
        (8, 2, 4, None),  # copies
    ],
)
def test_leaves_of_kv_heads(heads, kv_heads, ranks, leaves):
    config = dataclasses.replace(TINY, num_heads=heads, num_kv_heads=kv_heads)
    layout = Layout(config, Contract(), ranks)
    assert layout.leaves_of(layout.kv_slots) == leaves
    assert layout.leaves_of(layout.slots_of(layout.heads)) == layout.head_leaves
