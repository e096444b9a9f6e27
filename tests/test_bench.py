"""The benchmark: its cases, a small run on this CPU, the Hopper path on stand-ins, and what fails loudly."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from tbik_jax import bench, cli
from tbik_jax.kernels import matmul
from tbik_jax.shapes import Product, ProductShape

LARGE = ("qwen3-8b", "llama-3.1-8b", "qwen3-32b")
KEYS = {
    *("suite", "model", "product", "tp", "m", "n", "k", "tokens", "leaves", "tree", "dtype", "copies"),
    *(
        f"{side}_{what}"
        for side in ("ours", "baseline")
        for what in ("us", "spread_us", "tflops", "gbs", "kernels", "repeats")
    ),
    *("ratio", "bits", "baseline", "timer", "device", "jax", "cuda", "driver", "commit", "date"),
}
LAYER = ProductShape("smollm2-135m", "down", 1, 24, 96, 8, "row")


def tiny(direction="forward", tree="chain", rows=(3, 5)):
    return [
        bench.Case("small", Product(direction, LAYER, m, 3 if direction != "weight-gradient" else m), tree)
        for m in rows
    ]


def test_suites_of_a_gpu():
    found = bench.cases(bench.SUITES, LARGE, bench.TREES)
    assert len(found) == len(set(found))
    count = {suite: sum(case.suite == suite for case in found) for suite in bench.SUITES}
    # large: 5 products of one leaf, and 2 products with 8, 4 and 16 leaves in both trees and with 2 leaves in one.
    assert count == {
        "large": 3 * 2 * (5 + 2 * 7),
        "small": 3 * 5 * 4 * 4,
        "weight-gradient": 24,
        "input-gradient": 30,
    }
    small = [case for case in found if case.suite == "small"]
    assert {case.product.m for case in small} == {1, 8, 16, 64, 128}
    assert {case.product.shape.tp for case in small} == {1, 2, 4, 8}
    large = [case for case in found if case.suite == "large"]
    assert {(case.product.leaves, case.product.shape.tp) for case in large} == {(1, 8), (8, 1), (2, 4), (4, 2), (16, 1)}


def test_small_weights_come_from_memory():
    hopper = bench.Hopper.__new__(bench.Hopper)
    for case in bench.cases(["small"], LARGE, ["balanced"]):
        weight = 2 * case.product.shape.n * case.product.shape.k
        copies = hopper.copies(case, "bfloat16")
        assert copies * weight > 150e6
        assert copies <= 64


def test_a_run_on_the_cpu_gives_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.out, "width", 160)
    output = tmp_path / "rows.jsonl"
    arguments = ["bench", "--suites", "small", "--tree", "chain", "--repeat", "2", "--output", str(output)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == len(bench.cases(["small"], ["smollm2-135m"], ["chain"], backend="cpu"))
    for row in rows:
        assert set(row) == KEYS
        assert row["bits"] == "equal"
        assert row["ratio"] == pytest.approx(row["baseline_us"] / row["ours_us"], rel=1e-2)
        assert row["ours_spread_us"][0] <= row["ours_us"] <= row["ours_spread_us"][1]
        assert row["device"].startswith("CPU")
        assert row["ours_repeats"] == 2
    assert "all equal" in result.output
    assert "CPU" in result.output


@pytest.mark.parametrize("direction", ["forward", "weight-gradient", "input-gradient"])
@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_other_directions_and_dtypes(direction, dtype):
    cases = tiny(direction, rows=(6,))
    (row,) = bench.measure(cases, bench.Cpu(), dtype=dtype, repeat=1)
    assert row["bits"] == "equal", row
    assert [row["m"], row["n"]] == list(cases[0].product.result)


def test_other_bits_are_seen_and_counted(monkeypatch):
    right = bench.Cpu.product
    monkeypatch.setattr(bench.Cpu, "product", lambda *a: right(*a).at[0, :6].multiply(-1))
    (row,) = bench.measure(tiny(rows=(3,)), bench.Cpu(), dtype="float32", repeat=1)
    assert row["bits"] == 6 / (3 * 24)


def test_a_row_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path):
    right = bench.Cpu.product

    def product(self, case, a, b, dtype):
        if case.product.m == 3:
            raise RuntimeError("no such tile")
        return right(self, case, a, b, dtype)

    monkeypatch.setattr(bench.Cpu, "product", product)
    monkeypatch.setattr(bench, "cases", lambda *_, **__: tiny())
    result = CliRunner().invoke(cli.app, ["bench", "--repeat", "1", "--output", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 1
    assert "RuntimeError: no such tile" in result.output
    failed, sound = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert "no such tile" in failed["error"]
    assert set(sound) == KEYS


def test_the_limit_stops_and_says_so(monkeypatch):
    monkeypatch.setattr(bench, "cases", lambda *_, **__: tiny())
    result = CliRunner().invoke(cli.app, ["bench", "--limit-seconds", "0"])
    assert result.exit_code == 0
    assert "0 of 2 rows: --limit-seconds 0 is over" in result.output


def test_the_hopper_path_on_stand_ins(monkeypatch):
    """Everything but the kernels and CUPTI: operands, copies, compilation, comparison, rows."""
    import jax.experimental.mosaic.gpu as mosaic

    def product(spec, a, b, nodes, *, dtype=jnp.float32, tiles=None):
        first, second = spec.split("->")[0].split(",")
        leaves = matmul.leaf_products(jnp.einsum(f"{first}->mlk", a), jnp.einsum(f"{second}->lnk", b))
        found = [node.evaluate(lambda index: leaves[index], jnp.add) for node in nodes]
        return (jnp.stack(found) if len(found) > 1 else found[0]).astype(dtype)

    def measure(f, *, aggregate, iterations):
        assert not aggregate
        run = [("kernel", 0.25), ("kernel", 0.5)]
        return lambda *a: (f(*a), run if iterations == 1 else [run] * iterations)

    monkeypatch.setattr(matmul, "hopper", SimpleNamespace(product=product), raising=False)
    monkeypatch.setattr(mosaic, "profiler", SimpleNamespace(measure=measure), raising=False)
    monkeypatch.setattr(bench, "_ROTATION_BYTES", 10000)
    hopper = bench.Hopper("cublas")
    for repeat, direction in ((1, "forward"), (5, "weight-gradient"), (2, "input-gradient")):
        for row in bench.measure(tiny(direction, rows=(6,)), hopper, dtype="float32", repeat=repeat):
            assert row.get("bits") == "equal", row.get("error")
            assert row["copies"] > 1
            assert row["ours_us"] == pytest.approx(750 / row["copies"], rel=1e-3)
            assert row["ours_repeats"] == repeat
            assert row["ours_kernels"] == ["kernel"]
            assert set(row) == KEYS


def test_a_device_that_nobody_wrote_kernels_for_is_refused(monkeypatch):
    other = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda: [other])
    with pytest.raises(NotImplementedError, match=r"NVIDIA A100 \(gpu, compute capability 8.0\)"):
        bench.device()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suites", "huge"], "--suites 'huge': choose from large, small"),
        (["--model", "gpt-2"], "--model 'gpt-2': choose from"),
        (["--dtype", "int8"], "--dtype 'int8': choose from"),
        (["--tree", "star"], "--tree 'star': choose from"),
        (["--output", "no/folder/rows.jsonl"], "there is no folder no/folder"),
    ],
)
def test_refusals(arguments, message):
    error = CliRunner().invoke(cli.app, ["bench", *arguments]).exception
    assert isinstance(error, ValueError)
    assert message in str(error)


def test_summaries():
    def row(suite, tokens, ratio, bits="equal"):
        where = {"model": "x", "product": "down", "tp": 1, "leaves": 8, "tree": "chain"}
        return {"suite": suite, "tokens": tokens, "ratio": ratio, "bits": bits, **where}

    rows = [
        row("small", 1, 2.0),
        row("small", 1, 0.5),
        row("small", 8, 4.0, 0.1),
        row("large", 8192, 0.9),
        {"error": "no"},
    ]
    found = {(each.suite, each.tokens): each for each in bench.summaries(rows)}
    assert set(found) == {("small", 1), ("small", 8), ("small", None), ("large", None)}
    assert found["small", 1].geometric_mean == pytest.approx(1)
    assert found["small", None].geometric_mean == pytest.approx(4 ** (1 / 3))
    assert (found["small", None].smallest, found["small", None].bits_equal, found["small", None].rows) == (0.5, 2, 3)
    assert bench.geometric_mean([2, 8]) == pytest.approx(4)
    assert math.isclose(bench.geometric_mean([0.3]), 0.3)


def test_quartiles():
    assert bench.quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert bench.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
