"""Programs over models: generation and scoring."""

from tbik_jax.engine.generate import Generation, Generator, Step, make_mesh
from tbik_jax.engine.sampling import Sampling

__all__ = ["Generation", "Generator", "Sampling", "Step", "make_mesh"]
