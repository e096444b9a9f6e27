"""The canonical tree and its schedules, checked as associations: values are strings, ``add`` writes the brackets."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tbik_jax.tree import MAX_LEAVES, Node, Schedule, Tree, leaf_ranges, schedule

# Mostly small numbers, where the odd cases are, but up to the limit.
leaf_counts = st.one_of(st.integers(1, 24), st.integers(1, MAX_LEAVES))
arities = st.lists(st.one_of(st.integers(2, 5), st.integers(2, 256)), min_size=1, max_size=9)
trees = st.builds(Tree, leaf_counts, arities.map(tuple))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    tree = draw(trees)
    ranks = draw(
        st.one_of(st.integers(1, tree.leaves), st.sampled_from([n for n in (1, 2, 3, 4, 8) if n <= tree.leaves]))
    )
    return schedule(tree, ranks)


def bracket(a: str, b: str) -> str:
    return f"({a}+{b})"


def names(leaves: int) -> list[str]:
    return [str(i) for i in range(leaves)]


def grouped_by_hand(leaves: int, arities: list[int]) -> str:
    """The documented rule, written a second time on strings alone: group, add each group left-deep, repeat."""
    level, values = 0, names(leaves)
    while len(values) > 1:
        arity, level = arities[min(level, len(arities) - 1)], level + 1
        groups = [values[i : i + arity] for i in range(0, len(values), arity)]
        values = []
        for first, *rest in groups:
            for value in rest:
                first = bracket(first, value)
            values.append(first)
    return values[0]


# The tree ------------------------------------------------------------------------------------------------------------


@given(leaf_counts, arities)
def test_reduce_follows_the_documented_rule(leaves, arities):
    assert Tree(leaves, tuple(arities)).reduce(names(leaves), bracket) == grouped_by_hand(leaves, arities)


@pytest.mark.parametrize(
    "tree, association",
    [
        (Tree(8), "(((0+1)+(2+3))+((4+5)+(6+7)))"),
        (Tree(8, (8,)), "(((((((0+1)+2)+3)+4)+5)+6)+7)"),
        (Tree(8, (4, 2)), "((((0+1)+2)+3)+(((4+5)+6)+7))"),
        (Tree(7), "(((0+1)+(2+3))+((4+5)+6))"),
        (Tree(6, (8,)), "(((((0+1)+2)+3)+4)+5)"),
        (Tree(9, (3,)), "((((0+1)+2)+((3+4)+5))+((6+7)+8))"),
        (Tree(1), "0"),
    ],
)
def test_documented_shapes(tree, association):
    assert tree.reduce(names(tree.leaves), bracket) == association
    assert str(tree).replace(" ", "") == association


def test_three_chains_of_eight_then_a_chain_of_three():
    chains = [Tree.chain(8).reduce(names(24)[i : i + 8], bracket) for i in (0, 8, 16)]
    assert Tree(24, (8,)).reduce(names(24), bracket) == bracket(bracket(chains[0], chains[1]), chains[2])


@given(trees)
def test_levels_are_canonical(tree):
    again = Tree(tree.leaves, tree.levels or (2,))
    assert again.levels == tree.levels
    assert again.root == tree.root


@given(leaf_counts, arities, arities)
def test_equal_levels_mean_the_same_tree(leaves, some, others):
    a, b = Tree(leaves, tuple(some)), Tree(leaves, tuple(others))
    if a.levels == b.levels:
        assert a.root == b.root
    if a.root != b.root:
        assert a.levels != b.levels


def test_named_constructors():
    assert Tree.balanced(12).root == Tree(12, (2,)).root
    assert Tree.chain(12).root == Tree(12, (12,)).root == Tree(12, (200,)).root
    assert Tree.chain(1).root == Node(0, 1)


@given(trees)
def test_nodes_are_contiguous_and_ordered(tree):
    def walk(node: Node) -> None:
        if node.left is None:
            assert node.is_leaf and node.right is None and node.stop == node.start + 1
            return
        assert not node.is_leaf
        assert (node.left.start, node.left.stop, node.right.stop) == (node.start, node.right.start, node.stop)
        walk(node.left)
        walk(node.right)

    assert tree.root.span == (0, tree.leaves)
    walk(tree.root)


@given(trees, st.data())
def test_node_shape_is_the_association_without_the_position(tree, data):
    found: list[Node] = []

    def walk(node: Node) -> None:
        found.append(node)
        if node.left is not None:
            walk(node.left)
            walk(node.right)

    walk(tree.root)
    a, b = data.draw(st.sampled_from(found)), data.draw(st.sampled_from(found))

    def from_zero(node: Node) -> str:
        return node.evaluate(lambda i: str(i - node.start), bracket)

    assert (a.shape() == b.shape()) == (from_zero(a) == from_zero(b))


# A range of leaves as nodes ------------------------------------------------------------------------------------------


@given(trees, st.data())
def test_nodes_cover_a_range_with_the_fewest_whole_nodes(tree, data):
    start = data.draw(st.integers(0, tree.leaves))
    stop = data.draw(st.integers(start, tree.leaves))
    nodes = tree.nodes(start, stop)
    assert [i for node in nodes for i in range(node.start, node.stop)] == list(range(start, stop))

    def fewest(node: Node) -> int:
        """By definition: a node inside the range is one, else what its children need."""
        if node.stop <= start or stop <= node.start:
            return 0
        if start <= node.start and node.stop <= stop:
            return 1
        return fewest(node.left) + fewest(node.right)

    assert len(nodes) == fewest(tree.root)
    # Minimal: no node's parent lies inside the range as well.
    spans = {node.span for node in nodes}

    def walk(node: Node) -> None:
        if node.left is None:
            return
        if node.left.span in spans or node.right.span in spans:
            assert not (start <= node.start and node.stop <= stop)
        walk(node.left)
        walk(node.right)

    walk(tree.root)


@given(st.integers(1, MAX_LEAVES), st.data())
def test_a_balanced_tree_sends_few_nodes(leaves, data):
    plan = schedule(Tree(leaves), data.draw(st.integers(1, leaves)))
    assert plan.width <= max(1, 2 * math.ceil(math.log2(leaves)))


# Ranks ---------------------------------------------------------------------------------------------------------------


@given(leaf_counts, st.data())
def test_leaf_ranges_are_contiguous_and_even_the_first_ones_longer(leaves, data):
    ranks = data.draw(st.integers(1, leaves))
    ranges = leaf_ranges(leaves, ranks)
    assert [i for held in ranges for i in held] == list(range(leaves))
    lengths = [len(held) for held in ranges]
    assert len(lengths) == ranks
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)
    assert min(lengths) >= 1


@given(schedules())
@example(schedule(Tree(8, (4, 2)), 3))
@example(schedule(Tree(24), 16))
def test_any_number_of_ranks_performs_the_additions_of_one(plan):
    leaves = names(plan.tree.leaves)
    values = []
    for rank, held in enumerate(plan.ranges):
        slots = leaves[held.start : held.stop] + ["unread"] * (plan.slots - len(held))
        values.append(plan.reduce_local(rank, slots, bracket))
        assert len(values[-1]) <= plan.width
    assert plan.finish(values, bracket) == plan.tree.reduce(leaves, bracket)
    assert plan.finish_leaves([[leaves[leaf] for leaf in held] for held in plan.ranges], bracket) == plan.tree.reduce(
        leaves, bracket
    )


@given(schedules())
def test_width_slots_and_uniformity_say_what_they_count(plan):
    assert plan.width == max(len(nodes) for nodes in plan.rank_nodes)
    assert plan.slots == max(len(held) for held in plan.ranges)
    relative = [
        tuple(node.evaluate(lambda i, first=held.start: str(i - first), bracket) for node in nodes)
        for held, nodes in zip(plan.ranges, plan.rank_nodes, strict=True)
    ]
    assert plan.is_uniform == (len(set(relative)) == 1)


@given(schedules())
@example(schedule(Tree(8), 4))
@example(schedule(Tree(8, (4, 2)), 2))
@example(schedule(Tree(8, (4, 2)), 4))
@example(schedule(Tree(24, (3, 2)), 8))
@example(schedule(Tree(8, (2, 4)), 4))
@example(schedule(Tree(6), 2))
@settings(max_examples=200)
def test_a_butterfly_is_the_tree_up_to_the_order_of_two_operands(plan):
    """Recursive doubling, played through: rank r adds what rank r ^ step holds. In IEEE 754 too, a + b is b + a."""

    def unordered(a: object, b: object) -> object:
        return frozenset({a, b})

    power_of_two = plan.ranks & (plan.ranks - 1) == 0
    if not power_of_two or plan.width != 1:
        assert not plan.is_butterfly
        return
    values: list[object] = [plan.reduce_local(rank, list(held), unordered)[0] for rank, held in enumerate(plan.ranges)]
    step = 1
    while step < plan.ranks:
        values = [unordered(values[rank], values[rank ^ step]) for rank in range(plan.ranks)]
        step *= 2
    wanted = plan.tree.reduce(list(range(plan.tree.leaves)), unordered)
    assert plan.is_butterfly == (plan.is_uniform and all(value == wanted for value in values))


def test_the_papers_meshes_are_butterflies():
    assert all(schedule(Tree(8), ranks).is_butterfly for ranks in (1, 2, 4, 8))
    assert not any(schedule(Tree(8), ranks).is_butterfly for ranks in (3, 5, 6, 7))
    assert not any(schedule(Tree.chain(8), ranks).is_butterfly for ranks in (4, 8))


def test_schedules_are_cached():
    assert schedule(Tree(8), 4) is schedule(Tree(8), 4)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_tree_lists_everything_that_is_wrong_with_it():
    with pytest.raises(ValueError, match=r"^Tree: 3 problems") as error:
        Tree(0, (1, 2.0))
    text = str(error.value)
    assert f"leaves = 0 is not an integer in 1..{MAX_LEAVES}" in text
    assert "arity 1 is not an integer >= 2" in text
    assert "arity 2.0 is not an integer >= 2" in text


@pytest.mark.parametrize("leaves", [-1, 0, MAX_LEAVES + 1, 8.0, "8", None])
def test_leaves_that_are_none(leaves):
    with pytest.raises(ValueError, match=r"leaves = .* is not an integer in 1\.\."):
        Tree(leaves)


def test_no_arity():
    with pytest.raises(ValueError, match=r"arities is empty; \(2,\) is the balanced tree"):
        Tree(8, ())


def test_the_longest_chain_fits_the_interpreters_stack():
    tree = Tree.chain(MAX_LEAVES)
    assert tree.reduce([1] * MAX_LEAVES, int.__add__) == MAX_LEAVES
    plan = schedule(tree, 3)
    values = [plan.reduce_local(rank, [1] * plan.slots, int.__add__) for rank in range(3)]
    assert plan.finish(values, int.__add__) == MAX_LEAVES
    assert not plan.is_uniform and not plan.is_butterfly
    assert str(tree).endswith(f" + {MAX_LEAVES - 1})")


@pytest.mark.parametrize("ranks", [0, -1, 9])
def test_more_ranks_than_leaves_or_none(ranks):
    for make in (leaf_ranges, lambda leaves, ranks: schedule(Tree(leaves), ranks)):
        with pytest.raises(
            ValueError, match=rf"{ranks} ranks over 8 leaves.*\bUse a smaller mesh, or a contract with more"
        ):
            make(8, ranks)


def test_reduce_wants_one_value_per_leaf():
    with pytest.raises(ValueError, match="7 values for 8 leaves"):
        Tree(8).reduce(names(7), bracket)


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 9)])
def test_nodes_of_what_is_no_range(start, stop):
    with pytest.raises(ValueError, match=rf"leaves {start}\.\.{stop} are not a range inside 0\.\.8"):
        Tree(8).nodes(start, stop)


def test_finish_names_the_leaf_that_is_missing():
    with pytest.raises(ValueError, match=r"no node covers leaf 4; got \[\(0, 4\)\]"):
        Tree(8).finish({(0, 4): "a"}, bracket)
