"""What Pallas' Mosaic GPU calls differently in the versions of JAX that this package supports."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

#: jax 0.10 wants an index, 0.12 knows none.
_of_load = inspect.signature(plgpu.load).parameters.get("idx")
_NO_INDEX = ((),) if _of_load is not None and _of_load.default is inspect.Parameter.empty else ()

#: Whether a kernel can change an array that it was given: jax 0.10 does not take a `jax.Ref` for one in a larger program.
CHANGES_ARRAYS = jax.__version_info__ >= (0, 11)


def load_whole(ref: Any, *, layout: Any, optimized: bool = True) -> Any:
    """All of a reference, in that layout."""
    return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=optimized)
