"""Process borders: the bits of several processes are those of one with as many devices."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "multi_gpu.py"
pytestmark = [
    pytest.mark.invariance,
    pytest.mark.skipif(not SCRIPT.is_file(), reason="the benchmarks are not beside the tests"),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def rows(tmp_path: Path, processes: int, devices: int, *options: str) -> list[dict]:
    """What the script writes, run by so many processes of so many virtual CPU devices."""
    path = tmp_path / f"{processes}x{devices}.jsonl"
    command = [
        sys.executable,
        str(SCRIPT),
        "--cpu-devices",
        str(devices),
        "--model",
        "tiny",
        "--out",
        str(path),
        *options,
    ]
    if processes > 1:
        command += ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)]
    runs = [
        subprocess.Popen([*command, "--process", str(i)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(processes)
    ]
    texts = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * processes, "\n".join(text[-2000:] for text in texts)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_processes_have_the_bits_of_one(tmp_path):
    options = "--sections", "bits", "--batches", "8", "--new-tokens", "3"
    one = rows(tmp_path, 1, 8, *options, "--tp", "3")
    assert len(one) == 1
    digests = {row["digest"] for row in one}
    assert len(digests) == 1
    (several,) = rows(tmp_path, 2, 4, *options, "--tp", "3")
    assert (several["processes"], several["tp"], {several["digest"]}) == (2, 3, digests)


@pytest.mark.slow
def test_collectives_across_processes(tmp_path):
    options = "--sections", "collectives", "--tp", "3,8", "--kibibytes", "4", "--groups", "1"
    found = rows(tmp_path, 2, 4, *options)
    checked = [row for row in found if "bits" in row]
    assert {row["bits"] for row in checked} == {"equal"}
    refused = [(row["ranks"], row["algorithm"]) for row in found if "refused" in row]
    # Three ranks are no power of two, and no process reads another one's memory; all else runs.
    assert sorted(set(refused)) == [(3, "butterfly"), (3, "direct"), (3, "recursive_halving"), (8, "direct")]
    assert len(checked) == 2 * (3 + 5)
