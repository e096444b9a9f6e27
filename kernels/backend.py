"""Which family of kernels runs here, decided once and never in silence."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import Any, Literal

import jax

Family = Literal["cpu", "sm90"]
FAMILIES: tuple[Family, ...] = ("cpu", "sm90")


class SelfTestError(RuntimeError):
    """This XLA, on this processor or under these flags, does not give the bits that the contract asks for."""


def family() -> Family:
    """The backend family whose bits this process computes: ``"cpu"``, or ``"sm90"`` on Hopper GPUs (H100, H200, H20).

    Raises:
        NotImplementedError: on any other backend. Nothing falls back to products whose order nobody fixed.
    """
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    found = f"the default backend is {backend!r}"
    if backend in ("gpu", "cuda"):
        kinds = {(d.device_kind, str(getattr(d, "compute_capability", "unknown"))) for d in jax.local_devices()}
        if all(capability == "9.0" for _, capability in kinds):
            return "sm90"
        found += " with " + ", ".join(f"{kind} (compute capability {capability})" for kind, capability in sorted(kinds))
    raise NotImplementedError(
        f"tbik_jax: invariant kernels exist for CPUs and for Hopper GPUs (compute capability 9.0), and {found}. "
        f"Run with JAX_PLATFORMS=cpu, or use Numerics.plain(). Another GPU needs kernels of its own: wgmma and TMA, which "
        f"these are written with, are Hopper's."
    )


def multiprocessors() -> int:
    """Of the GPU that a program is traced for."""
    abstract: Any = jax.sharding.get_abstract_mesh().abstract_device
    return int(abstract.num_cores if abstract is not None else jax.devices()[0].core_count)


@functools.cache
def reach_each_other(*ordinals: int) -> bool:
    """Whether the GPUs of this process with these numbers may read each other's memory; False if the driver does not tell."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        for a, b in itertools.permutations(ordinals, 2):
            devices, found = (ctypes.c_int(), ctypes.c_int()), ctypes.c_int()
            results = [cuda.cuDeviceGet(ctypes.byref(d), n) for d, n in zip(devices, (a, b), strict=True)]
            results.append(cuda.cuDeviceCanAccessPeer(ctypes.byref(found), *devices))
            if any(results) or not found.value:
                return False
    except (OSError, AttributeError):
        return False
    return True


def require_cpu(what: str) -> None:
    """Refuse ``what`` on a family that has no kernel for it yet.

    Raises:
        NotImplementedError: elsewhere than on the CPU.
    """
    if (here := family()) != "cpu":
        raise NotImplementedError(
            f"{what} has no kernel in family {here!r} yet: XLA would choose its order. Matrix products, the collectives and "
            f"the elementwise stages run here; the whole model runs with JAX_PLATFORMS=cpu, or with Numerics.plain()."
        )
