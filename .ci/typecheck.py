"""Type-check the package as it is installed: ``python .ci/typecheck.py [MYPY ARGUMENTS]``.

``kernels/`` and ``models/`` are installed as ``tbik_jax.kernels`` and ``tbik_jax.models``. An editable
install maps those names with an import hook, which type checkers cannot see. So this lays out the packages of
pyproject.toml in ``build/typecheck``, the way a wheel would, and runs mypy there; messages name the real
files.

It also stops if a package folder is missing from pyproject.toml: a wheel would lack it, and an editable
install hides that.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = ROOT / "build" / "typecheck"


def package_folders() -> dict[str, Path]:
    """Every package that pyproject.toml names, and its folder, parents first."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped: dict[str, str] = setuptools["package-dir"]
    folders: dict[str, Path] = {}
    for name in sorted(setuptools["packages"]):
        parent, _, leaf = name.rpartition(".")
        folders[name] = ROOT / mapped[name] if name in mapped else folders[parent] / leaf
    return folders


def unlisted(folders: dict[str, Path]) -> list[Path]:
    """Package folders inside the listed ones that pyproject.toml does not list."""
    found = {file.parent for top in folders.values() for file in top.rglob("__init__.py")}
    return sorted(folder.relative_to(ROOT) for folder in found - set(folders.values()))


def lay_out(folders: dict[str, Path]) -> None:
    """A tree of real folders with links to the files, so that new and removed files always count."""
    shutil.rmtree(LAYOUT, ignore_errors=True)
    for name, source in folders.items():
        target = LAYOUT.joinpath(*name.split("."))
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix in (".py", ".pyi") or file.name == "py.typed":
                (target / file.name).symlink_to(file)


def with_real_paths(text: str, folders: dict[str, Path]) -> str:
    """mypy's messages with ``kernels/...`` for ``tbik_jax/kernels/...``."""
    for name, source in sorted(folders.items(), reverse=True):  # the longest name first
        laid_out = re.escape(name.replace(".", "/") + "/")
        text = re.sub(rf"^{laid_out}", f"{source.relative_to(ROOT)}/", text, flags=re.MULTILINE)
    return text


def main() -> int:
    """Mypy's exit status, or 1 if pyproject.toml is incomplete."""
    folders = package_folders()
    if missing := unlisted(folders):
        names = ", ".join(map(str, missing))
        print(f"pyproject.toml: [tool.setuptools] packages lacks {names}", file=sys.stderr)
        return 1
    lay_out(folders)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), *sys.argv[1:], "-p", "tbik_jax"]
    done = subprocess.run(command, cwd=LAYOUT, capture_output=True, text=True, check=False)
    sys.stdout.write(with_real_paths(done.stdout, folders))
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
