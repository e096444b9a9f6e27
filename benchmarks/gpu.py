"""Everything that wants a Hopper GPU, in one call: tests of bits side by side, then measurements one after another.

    python benchmarks/gpu.py --folder rows [--only tests,bits,products] [--seconds 540]

Each part has a log and, if it measures, rows in the folder; what fails or runs out of time does not stop the others. The last
lines say how each part ended. Tests of bits share the GPU, so that compiling, which takes most of their time, uses all cores;
nothing else runs while something is measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {
    "products": ["tests/kernels/test_hopper.py", "-k", "not one_card"],
    "emulated": ["tests/kernels/test_hopper.py", "-k", "one_card"],
    "attention": ["tests/kernels/test_attention.py"],
    "gradients": ["tests/kernels/test_attention_backward.py"],
    "stages": ["tests/kernels/test_elementwise_hopper.py", "tests/kernels/test_elementwise.py"],
    "training": ["tests/models/test_gradients.py"],
    "others": ["tests/kernels/test_segment_sum.py", "tests/test_gradients.py", "tests/test_optimizer.py"],
}


def parts(folder: Path) -> dict[str, list[str]]:
    """What is measured: name to command."""
    bench = ["-m", "tbik_jax.cli", "bench", "--repeat", "6", "--output", str(folder / "hopper_matmul.jsonl")]
    here = "benchmarks"
    return {
        "bits": [
            f"{here}/hopper_bits.py",
            "--models",
            "qwen3",
            "--processes",
            "12",
            "--out",
            str(folder / "hopper_bits.jsonl"),
        ],
        "model": [f"{here}/hopper_model.py", "--kernels", "--out", str(folder / "hopper_model.jsonl")],
        "attention": [f"{here}/hopper_attention.py", "--out", str(folder / "hopper_attention.jsonl")],
        "stages": [f"{here}/hopper_stages.py", "--out", str(folder / "hopper_stages.jsonl")],
        "products": [*bench, "--suites", "large,weight-gradient,input-gradient", "--model", "qwen3-8b"],
        "few-rows": [*bench, "--suites", "small"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("gpu-rows"))
    parser.add_argument("--only", default="", help="tests and measured parts, by name; default: all")
    parser.add_argument("--seconds", type=float, default=3600, help="when to stop")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end, only = time.monotonic() + options.seconds, [name for name in options.only.split(",") if name]
    ended: dict[str, str] = {}

    if not only or "tests" in only:
        shared = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        running = {}
        for name, arguments in TESTS.items():
            with (folder / f"test-{name}.log").open("w") as log:
                command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *arguments]
                running[f"test-{name}"] = subprocess.Popen(command, cwd=ROOT, env=shared, stdout=log, stderr=log)
        for name, process in running.items():
            try:
                status = process.wait(timeout=max(1, end - time.monotonic()))
                ended[name] = "passed" if status == 0 else f"FAILED ({status})"
            except subprocess.TimeoutExpired:
                process.kill()
                ended[name] = "out of time"
            print(f"{name}: {ended[name]}", flush=True)
    for name, arguments in parts(folder).items():
        if only and name not in only:
            continue
        left = end - time.monotonic()
        if left < 5:
            ended[name] = "no time left"
            continue
        start = time.monotonic()
        with (folder / f"{name}.log").open("w") as log:
            run = os.environ | ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if name == "model" else {})
            try:
                status = subprocess.run(
                    [sys.executable, *arguments], cwd=ROOT, env=run, stdout=log, stderr=log, timeout=left, check=False
                ).returncode
                ended[name] = "done" if status == 0 else f"FAILED ({status})"
            except subprocess.TimeoutExpired:
                ended[name] = "out of time"
        print(f"{name}: {ended[name]} in {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(f"{name:16} {how}" for name, how in ended.items()))
    if any("FAILED" in how for how in ended.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
