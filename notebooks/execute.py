"""Execute the notebooks of this folder: ``python notebooks/execute.py [--write] [NOTEBOOK ...]``.

Each starts from a clean state: outputs cleared, a fresh kernel of this very Python, this folder as working directory.
All are run even if one fails; the exit status is 1 if any cell raised. ``--write`` stores the outputs of those that
succeeded, without timings, so that a second run on the same machine leaves the files unchanged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).resolve().parent


def clear(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def execute(path: Path, timeout: int) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    clear(notebook)
    # No kernel folders: "python3" is then this interpreter, not a kernel that is registered on the machine.
    this_python = KernelSpecManager(kernel_dirs=[])
    resources = {"metadata": {"path": str(FOLDER)}}
    with tempfile.TemporaryDirectory() as sockets:
        kernel = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=this_python, transport="ipc", ip=f"{sockets}/kernel"
        )
        client = NotebookClient(notebook, km=kernel, timeout=timeout, resources=resources, record_timing=False)
        client.execute(cleanup_kc=True)  # a manager of our own is not shut down otherwise
    return notebook


def local_paths(notebook: nbformat.NotebookNode) -> list[str]:
    """Folders of this machine that the outputs name: nothing to publish."""
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    folders = {str(FOLDER.parent), str(Path.home()), sys.prefix, sys.base_prefix} - {"/", "/usr"}
    return sorted(folder for folder in folders if json.dumps(folder)[1:-1] in outputs)


def run(path: Path, timeout: int, write: bool) -> tuple[Path, float, str]:
    """How long it took, and what was wrong, if anything."""
    start, problem = time.monotonic(), ""
    try:
        notebook = execute(path, timeout)
        if write and (found := local_paths(notebook)):
            problem = f"not written, its outputs name folders of this machine: {', '.join(found)}"
        elif write:
            nbformat.write(notebook, path)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        problem = str(error).rstrip()
    return path, time.monotonic() - start, problem


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute the notebooks of this folder from a clean state.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run (default: all)")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell (default: 600)")
    arguments = parser.parse_args()

    paths = arguments.notebooks or sorted(FOLDER.glob("*.ipynb"))
    if not paths:
        parser.error(f"no notebooks (*.ipynb) in {FOLDER.name}/")
    if absent := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"no such notebook: {', '.join(absent)}")

    failed = 0
    # A kernel is a process of its own; two at a time keep two cores at work, which one seldom does.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for path, seconds, problem in pool.map(lambda path: run(path, arguments.timeout, arguments.write), paths):
            failed += bool(problem)
            print(f"{'FAILED' if problem else 'ok':6}  {seconds:6.1f} s  {path.name}", flush=True)
            if problem:
                print(problem, flush=True)
    print(f"{len(paths) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
