"""The contract is stored whole, and nothing but the stored one runs."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tbik_jax import CONTRACT_VERSION, Contract, ContractMismatchError, Tree
from tbik_jax.tree import MAX_LEAVES

FIELDS = [field.name for field in dataclasses.fields(Contract)]
# One other legal value per field. `version` has none: a package implements exactly one.
OTHER = {"leaves": 16, "tree": (4, 2), "kv_block": 256}


def with_version(contract: Contract, version: int) -> Contract:
    """A contract of another release, which this one refuses to construct."""
    foreign = dataclasses.replace(contract)
    object.__setattr__(foreign, "version", version)
    return foreign


def changed(field: str) -> Contract:
    if field == "version":
        return with_version(Contract(), CONTRACT_VERSION + 1)
    assert field in OTHER, f"a new field {field!r} of Contract needs another value here, so that its mismatch is tested"
    return dataclasses.replace(Contract(), **{field: OTHER[field]})


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_stored(field):
    contract = changed(field)
    stored = json.loads(contract.to_json())
    assert stored[field] != json.loads(Contract().to_json())[field]
    if field != "version":
        assert Contract.from_json(contract.to_json()) == contract


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_refused_on_mismatch(field):
    stored, asked = changed(field), Contract()
    with pytest.raises(ContractMismatchError) as error:
        stored.require(asked)
    lines = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    mine, other = stored.to_dict()[field], asked.to_dict()[field]
    assert lines == [f"  - {field}: stored {mine!r}, asked {other!r}"]


def test_a_mismatch_lists_every_field_and_what_to_do():
    with pytest.raises(ContractMismatchError) as error:
        Contract().require(Contract(**OTHER))
    text = str(error.value)
    assert [name for name in FIELDS if f"  - {name}:" in text] == list(OTHER)
    assert "  - leaves: stored 8, asked 16" in text
    assert "  - tree: stored [2], asked [4, 2]" in text
    assert "Use the stored contract, or convert the weights anew" in text
    assert isinstance(error.value, ValueError)


def test_the_same_contract_is_accepted():
    Contract(**OTHER).require(Contract(**OTHER))


@pytest.mark.parametrize("contract", [Contract(), Contract(leaves=24, tree=(3, 2), kv_block=64)])
def test_json_round_trip(contract):
    again = Contract.from_json(contract.to_json())
    assert again == contract
    assert hash(again) == hash(contract)  # lists come back as tuples
    assert again.to_json() == contract.to_json()


def test_a_list_of_arities_is_a_tuple():
    assert Contract(tree=[4, 2]) == Contract(tree=(4, 2))


def test_unknown_and_missing_fields_are_all_listed():
    data = Contract().to_dict()
    del data["leaves"], data["kv_block"]
    data |= {"split_k": 4, "rounding": "node"}
    with pytest.raises(ValueError, match=r"^Contract.from_dict: 4 problems") as error:
        Contract.from_dict(data)
    text = str(error.value)
    for message in (
        "field 'kv_block' is missing",
        "field 'leaves' is missing",
        "field 'rounding' = 'node' is unknown here; install the tbik-jax release that wrote it",
        "field 'split_k' = 4 is unknown here",
    ):
        assert message in text


def test_another_version_is_refused_with_the_way_out():
    data = Contract().to_dict() | {"version": CONTRACT_VERSION + 1}
    with pytest.raises(ValueError, match=r"^Contract: 1 problem\n") as error:
        Contract.from_json(json.dumps(data))
    assert f"version = {CONTRACT_VERSION + 1}, but this package implements version {CONTRACT_VERSION} only" in str(
        error.value
    )
    assert "install the tbik-jax release that wrote it" in str(error.value)


def test_all_violations_at_once():
    with pytest.raises(ValueError, match=r"^Contract: 4 problems") as error:
        Contract(leaves=0, tree=(1,), kv_block=100, version=0)
    text = str(error.value)
    for message in (
        f"leaves = 0 is not an integer in 1..{MAX_LEAVES}",
        "tree = (1,) is not a tuple of arities >= 2",
        "kv_block = 100 is not a positive multiple of 64",
        "version = 0",
    ):
        assert message in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"leaves": MAX_LEAVES + 1},
        {"leaves": 8.0},
        {"leaves": "8"},
        {"tree": ()},
        {"tree": (2, 0)},
        {"tree": (2.0,)},
        {"kv_block": 0},
        {"kv_block": -64},
        {"kv_block": 96},
        {"kv_block": 128.0},
        {"version": None},
    ],
)
def test_a_wrong_field_is_named_with_its_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=r"^Contract: 1 problem\n") as error:
        Contract(**wrong)
    assert f"{name} = {value!r}" in str(error.value)


def test_a_contract_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Contract().leaves = 4


def test_leaves_for_is_the_smallest_divisor_that_is_large_enough():
    for leaves in (1, 2, 3, 8, 12):
        contract = Contract(leaves=leaves)
        for units in range(1, 200):
            divisors = [n for n in range(1, units + 1) if units % n == 0 and n >= leaves]
            assert contract.leaves_for(units) == (min(divisors) if divisors else units)


def test_leaves_for_documented_examples():
    contract = Contract(leaves=8)
    assert [contract.leaves_for(units) for units in (1536, 9, 4, 576, 49152)] == [8, 9, 4, 8, 8]


def test_tree_over_has_the_contracts_shape():
    assert Contract(tree=(4, 2)).tree_over(24) == Tree(24, (4, 2))
