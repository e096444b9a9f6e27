"""The family of this machine, and the programs of Hopper's threads where no Hopper is."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from tbik_jax.kernels import backend


#: No version of JAX changes what NumPy computes.
@pytest.fixture(params=["here", pytest.param("threads in NumPy", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test in both; the family's name."""
    if request.param == "here":
        yield backend.family()
        return
    if jax.default_backend() != "cpu":
        pytest.skip(f"the threads' programs run by themselves here: the default backend is {jax.default_backend()}")
    hopper(monkeypatch)
    jax.clear_caches()  # what was traced for the CPU
    yield "sm90"
    jax.clear_caches()


def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Family ``sm90``, its threads in NumPy."""
    from tbik_jax.kernels.hopper import compat, simt
    from tests.kernels import simt_numpy

    monkeypatch.setattr(backend, "family", lambda: "sm90")
    monkeypatch.setattr(simt, "launch", simt_numpy.launch)
    monkeypatch.setattr(compat, "CHANGES_ARRAYS", True)  # NumPy can
