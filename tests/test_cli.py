"""The command line, in this process: what it prints, its exit status, its refusals."""

import io
import json
import subprocess
import sys

import pytest

from tbik_jax import cli, verify
from tbik_jax.contract import Contract
from tbik_jax.models.open import open_model

FAST = ["--model", "tiny", "--mesh-sizes", "1,3", "--batch-sizes", "1,2", "--prompts", "2", "--new-tokens", "6"]


def run(monkeypatch, capsys, *arguments):
    """``(exit status, standard output, standard error)``."""
    monkeypatch.setattr(sys, "argv", ["tbik-jax", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    return exit_.value.code or 0, captured.out, captured.err


@pytest.mark.invariance
@pytest.mark.slow
def test_verify_shows_both_sides_and_writes_them(monkeypatch, capsys, tmp_path):
    status, out, _ = run(monkeypatch, capsys, "verify", *FAST, "--json", str(tmp_path / "report.json"))
    assert status == 0
    assert "Every configuration gave the same bits" in out
    report = json.loads((tmp_path / "report.json").read_text())
    plain, invariant = report["sides"]
    assert report["holds"]
    assert (plain["numerics"], invariant["numerics"]) == ("plain", "invariant")
    assert invariant["is_invariant"]
    assert invariant["logit_digests"] == 1
    assert invariant["mean_divergence"] == invariant["max_divergence"] == 0
    assert not plain["is_invariant"]
    assert plain["logit_digests"] > 1
    assert 0 < plain["mean_divergence"] <= plain["max_divergence"] < 1e-3
    assert [(c["tp"], c["batch"]) for c in invariant["configurations"]] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert Contract.from_dict(report["contract"]) == Contract()


def test_verify_fails_where_the_invariant_side_differs(monkeypatch, capsys):
    broken = verify.Numerics.plain
    monkeypatch.setattr(verify.Numerics, "invariant", staticmethod(lambda contract: broken(contract)))
    status, out, _ = run(monkeypatch, capsys, "verify", *FAST, "--batch-sizes", "2", "--numerics", "invariant")
    assert status == 1
    assert "differs between configurations" in out


def test_generate_streams_the_same_text_on_another_mesh(monkeypatch, capsys):
    arguments = [
        "generate",
        "Hello",
        "--model",
        "tiny",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0.9",
        "--seed",
        "3",
    ]
    status, one, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert one.startswith("Hello")
    assert len(one) > len("Hello\n")
    assert run(monkeypatch, capsys, *arguments, "--mesh", "dp=1,tp=5")[1] == one


def test_generate_reads_standard_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo".encode())))
    status, out, _ = run(monkeypatch, capsys, "generate", "-", "--model", "tiny", "--max-new-tokens", "1")
    assert status == 0
    assert out.startswith("héllo")


def test_info_names_versions_and_what_is_supported(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "info")
    assert status == 0
    for part in ("tbik-jax", "jaxlib", "contract", "(((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)))", "family 'cpu'"):
        assert part in out


@pytest.mark.parametrize(
    "arguments, messages",
    [
        (
            ["generate", "x", "--model", "no/such/model"],
            ["'no/such/model' is not a model", "Nothing is ever downloaded"],
        ),
        (["generate", "x", "--model", "tiny", "--mesh", "17"], ["wants 17 devices, and there are 16"]),
        (
            ["generate", "x", "--model", "tiny", "--mesh", "11"],
            ["11 tensor-parallel ranks", "use at most 10", "at most 8"],
        ),
        (["generate", "x", "--model", "tiny", "--mesh", "pp=2"], ["--mesh 'pp=2': write a number of devices"]),
        (
            ["generate", "x", "--model", "tiny", "--dtype", "float8"],
            ["--dtype 'float8': choose from float32, bfloat16"],
        ),
        (["generate", "x", "--model", "tiny", "--leaves", "0", "--tree", "1"], ["leaves = 0", "tree = (1,)"]),
        (["generate", "x", "--model", "tiny", "--temperature", "-1"], ["temperature = -1.0 is"]),
        (["generate", "x" * 2000, "--model", "tiny"], ["the model's context is 1024"]),
        (["verify", "--model", "tiny", "--mesh-sizes", "1,x"], ["--mesh-sizes '1,x' is not a list of integers"]),
        (
            ["verify", "--model", "tiny", "--mesh-sizes", "9,40"],
            ["mesh size 9", "mesh size 40, but there are 16 devices"],
        ),
        (["verify", "--model", "tiny", "--json", "no/folder/x.json"], ["there is no folder no/folder"]),
        (["verify", "--model", "tiny", "--prompts-file", "no.txt"], ["--prompts-file no.txt"]),
        (["verify", "--model", "tiny", "--numerics", "exact"], ["choose from plain, invariant"]),
    ],
)
def test_refusals_are_one_message_and_status_2(monkeypatch, capsys, arguments, messages):
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2
    text = " ".join(err.split())
    assert text.startswith("error:")
    assert "Traceback" not in text
    for message in messages:
        assert message in text


def test_input_that_is_not_utf8(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    status, _, err = run(monkeypatch, capsys, "generate", "-", "--model", "tiny")
    assert status == 2
    assert "standard input is not UTF-8" in err
    (tmp_path / "prompts.txt").write_bytes(b"\xff")
    status, _, err = run(
        monkeypatch, capsys, "verify", "--model", "tiny", "--prompts-file", str(tmp_path / "prompts.txt")
    )
    assert status == 2
    assert "utf-8" in err


def test_virtual_devices_are_arranged_in_a_fresh_process():
    program = "import sys; sys.argv = ['tbik-jax', 'generate', 'a', '--model', 'tiny', '--mesh', '3', '--max-new-tokens', '1']\n"
    program += "from tbik_jax import cli\ntry: cli.main()\nexcept SystemExit as e: assert not e.code\n"
    program += "import jax; print(jax.device_count())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "3", result.stderr


def test_verify_counts_texts_digests_and_divergence():
    report = verify.verify(
        open_model("tiny"), mesh_sizes=(1,), batch_sizes=(2,), prompts=["ab", "abc"], new_tokens=3, kinds=("invariant",)
    )
    (side,) = report.sides
    assert side.unique_outputs == 1
    assert side.logit_digests == 1
    assert side.batch_is_alone is None
    assert side.is_invariant
    assert [len(t) for t in side.configurations[0].tokens] == [3, 3]
