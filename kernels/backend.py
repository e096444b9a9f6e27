"""Which family of kernels runs here, decided once and never in silence."""

from __future__ import annotations

import jax

FAMILIES = ("cpu",)


class SelfTestError(RuntimeError):
    """This XLA, on this processor or under these flags, does not give the bits that the contract asks for."""


def family() -> str:
    """The backend family whose bits this process computes: ``"cpu"``.

    Raises:
        NotImplementedError: on any other backend. Nothing falls back to products whose order nobody fixed.
    """
    backend = jax.default_backend()
    if backend != "cpu":
        raise NotImplementedError(
            f"tbik_jax: invariant kernels exist for the CPU only, and the default backend is {backend!r}. "
            f"Run with JAX_PLATFORMS=cpu, or use Numerics.plain()."
        )
    return "cpu"
