"""The paper's experiment on one's own machine: the same prompts on every mesh and in every batch, bit by bit.

References: arXiv 2511.17826, section 5 (unique outputs over tensor-parallel sizes and batch sizes; divergence of the
top-5 probabilities). Digests of all logits, prefill against decode, and batch against alone are stricter and this package's.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from tbik_jax._problems import Problems
from tbik_jax.contract import Contract
from tbik_jax.engine.generate import Generation, Generator, make_mesh
from tbik_jax.models.layout import Layout
from tbik_jax.models.loading import load
from tbik_jax.models.open import OpenedModel
from tbik_jax.models.source import CachedSource
from tbik_jax.numerics import Numerics
from tbik_jax.testing import digest

#: Prompts of different lengths and kinds, in the order in which they are used.
PROMPTS = (
    "The capital of France is",
    "Q: A train leaves at 9:40 and arrives at 13:05. How long does it travel?\nA:",
    "def fibonacci(n):",
    "Once upon a time, in a village at the edge of a dark forest, there lived",
    "Three reasons why the sky is blue:\n1.",
    "Translate to French: I would like a cup of coffee, please.\n",
    "Water boils at",
    "A conversation between a doctor and a patient.\nPatient: I have had a headache for three days.\nDoctor:",
)

#: Called with (what runs now, configurations done, configurations in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Configuration:
    """One mesh and batch size, under which every prompt was run."""

    tp: int
    batch: int
    seconds: float
    #: Per prompt: the generated ids, and SHA-256 of the bits of all logits they were chosen from.
    tokens: tuple[tuple[int, ...], ...] = field(repr=False)
    digests: tuple[str, ...] = field(repr=False)
    #: Whether one device computed for all ranks, one after the other.
    emulated: bool = False


@dataclass(frozen=True)
class Side:
    """What one numerics in one dtype gave over all configurations."""

    numerics: str
    dtype: str
    configurations: tuple[Configuration, ...] = field(repr=False)
    #: Distinct texts per prompt, averaged over the prompts; 1 is what a user expects.
    unique_outputs: float
    #: Distinct digests of all logits of all prompts.
    logit_digests: int
    #: The largest difference of a top-5 probability between two configurations, averaged over the positions before
    #: the texts part (the paper's measure), and its maximum.
    mean_divergence: float
    max_divergence: float
    #: Full-sequence forward and token-by-token decoding gave the same bits, on every mesh.
    prefill_is_decode: bool
    #: Every prompt gave the same bits whatever its batch, on every mesh; None if there was one batch size only.
    batch_is_alone: bool | None

    @property
    def is_invariant(self) -> bool:
        """One text, one digest, and neither prefill nor a batch tells itself apart."""
        return (
            self.unique_outputs == 1
            and self.logit_digests == 1
            and self.prefill_is_decode
            and self.batch_is_alone is not False
        )


@dataclass(frozen=True)
class Report:
    """All sides, and where they were computed."""

    model: str
    contract: Contract
    prompts: tuple[str, ...]
    new_tokens: int
    sides: tuple[Side, ...]
    environment: dict[str, str]

    @property
    def holds(self) -> bool:
        """Nothing on the invariant side differs anywhere."""
        return all(side.is_invariant for side in self.sides if side.numerics == "invariant")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "contract": self.contract.to_dict(),
            "prompts": list(self.prompts),
            "new_tokens": self.new_tokens,
            "environment": self.environment,
            "holds": self.holds,
            "sides": [{**asdict(side), "is_invariant": side.is_invariant} for side in self.sides],
        }


def check(
    opened: OpenedModel,
    mesh_sizes: Sequence[int],
    batch_sizes: Sequence[int],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    contract: Contract,
    emulate: bool = False,
) -> None:
    """Everything that could go wrong with the request, before any compute."""
    config, devices = opened.config, jax.device_count()
    with Problems("verify") as problems:
        problems.check(len(mesh_sizes) > 0 and len(batch_sizes) > 0, "give at least one mesh size and one batch size")
        problems.check(new_tokens >= 1, f"new_tokens = {new_tokens}; at least one token is generated")
        for tp in mesh_sizes:
            problems.check(
                1 <= tp <= devices or (emulate and tp >= 1),
                f"mesh size {tp}, but there are {devices} devices; emulate=True runs larger meshes on one of them",
            )
            largest = Layout.max_ranks(config, contract)
            problems.check(
                tp <= largest,
                f"mesh size {tp}, but {opened.name} has at most {largest} ranks under a contract of {contract.leaves} leaves",
            )
        for batch in batch_sizes:
            problems.check(batch >= 1, f"batch size {batch} is not positive")
        problems.check(len(prompts) > 0, "no prompts")
        for i, prompt in enumerate(prompts):
            problems.check(len(prompt) > 0, f"prompt {i} has no tokens")
            problems.check(
                len(prompt) + new_tokens <= config.max_position_embeddings,
                f"prompt {i} of {len(prompt)} tokens and {new_tokens} new ones exceed the context of "
                f"{config.max_position_embeddings}",
            )


def verify(
    opened: OpenedModel,
    *,
    mesh_sizes: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
    batch_sizes: Sequence[int] = (1, 3, 8),
    dtypes: Sequence[str] = ("float32",),
    kinds: Sequence[str] = ("plain", "invariant"),
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 64,
    contract: Contract | None = None,
    emulate: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Greedy generation of every prompt under every configuration, in plain and in invariant numerics.

    ``emulate`` lets one device run the ranks of meshes that are larger than the number of devices, one after the other.

    Raises:
        ValueError: more ranks than devices or leaves, prompts that do not fit the context, and so on, all listed.
    """
    contract = contract or Contract()
    if opened.tokenizer is None:
        raise ValueError(f"verify: {opened.name} has no tokenizer, and the prompts are texts")
    ids = [opened.tokenizer.encode(prompt) for prompt in prompts]
    check(opened, mesh_sizes, batch_sizes, ids, new_tokens, contract, emulate)
    source, sides, done = CachedSource(opened.source), [], 0
    total = len(dtypes) * len(kinds) * len(mesh_sizes) * len(batch_sizes)
    for dtype in dtypes:
        for kind in kinds:
            numerics = Numerics.plain(contract) if kind == "plain" else Numerics.invariant(contract)
            collected = _Collected()
            for tp in mesh_sizes:
                if progress is not None:
                    progress(f"{kind} {dtype}, mesh {tp}: loading", done, total)
                alone = tp > jax.device_count()
                mesh = make_mesh(tp=1 if alone else tp)
                model = load(opened.config, source, numerics, mesh, dtype=dtype, ranks=tp if alone else None)
                # A scan over layers compiles many times faster than all of them unrolled, and few tokens are run here.
                generator = Generator(model, mesh, unroll=False, emulate=alone)
                for batch in batch_sizes:
                    if progress is not None:
                        progress(f"{kind} {dtype}, mesh {tp}, batch {batch}", done, total)
                    collected.add(tp, batch, *_run(generator, ids, batch, new_tokens), emulated=alone)
                    done += 1
                collected.compare_prefill(generator, ids)
            sides.append(collected.side(kind, dtype))
    if progress is not None:
        progress("done", total, total)
    return Report(opened.name, contract, tuple(prompts), new_tokens, tuple(sides), environment())


def environment() -> dict[str, str]:
    """Versions and devices, as rows and reports name them."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "backend": device.platform,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "machine": platform.machine(),
    }


def _run(
    generator: Generator, prompts: Sequence[Sequence[int]], batch: int, new_tokens: int
) -> tuple[float, list[Generation]]:
    start, found = time.perf_counter(), []
    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        filled = some + [prompts[0]] * (batch - len(some))
        found += generator.generate(filled, new_tokens, with_logits=True)[: len(some)]
    return time.perf_counter() - start, found


class _Collected:
    """Results of one side as they come in; logits are compared and dropped."""

    def __init__(self) -> None:
        self.configurations: list[Configuration] = []
        self.prefill_is_decode = True
        self._last: list[Generation] = []
        self._reference: list[Generation] = []
        self._top: list[npt.NDArray[Any]] = []  # per prompt, the reference's five likeliest tokens [T, 5]
        self._low: list[npt.NDArray[Any]] = []  # per prompt, the smallest and largest probability seen of each
        self._high: list[npt.NDArray[Any]] = []
        self._agreed: list[int] = []  # per prompt, positions before any configuration chose another token

    def add(self, tp: int, batch: int, seconds: float, found: list[Generation], *, emulated: bool = False) -> None:
        if not self.configurations:
            self._reference = found
            self._top = [np.argsort(-_logits(g), axis=-1, kind="stable")[:, :5] for g in found]
            self._low = [self._probabilities(i, g) for i, g in enumerate(found)]
            self._high = [p.copy() for p in self._low]
            self._agreed = [len(g.tokens) for g in found]
        for i, g in enumerate(found):
            p, first = self._probabilities(i, g), self._reference[i]
            self._low[i], self._high[i] = np.minimum(self._low[i], p), np.maximum(self._high[i], p)
            parted = [at for at, (a, b) in enumerate(zip(g.tokens, first.tokens, strict=True)) if a != b]
            # The distribution at the first different token still had the same context.
            self._agreed[i] = min([self._agreed[i], *[at + 1 for at in parted[:1]]])
        digests = tuple(digest(_logits(g)) for g in found)
        tokens = tuple(g.tokens for g in found)
        self.configurations.append(Configuration(tp, batch, round(seconds, 3), tokens, digests, emulated))
        self._last = found

    def _probabilities(self, prompt: int, g: Generation) -> npt.NDArray[Any]:
        logits = _logits(g).astype(np.float64)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.take_along_axis(weights / weights.sum(axis=-1, keepdims=True), self._top[prompt], axis=-1)

    def compare_prefill(self, generator: Generator, prompts: Sequence[Sequence[int]]) -> None:
        """One forward over prompt and answer against the decode steps that made the answer."""
        full = [[*prompt, *g.tokens[:-1]] for prompt, g in zip(prompts, self._last, strict=True)]
        for i, logits in enumerate(generator.score(full)):
            same = logits[len(prompts[i]) - 1 :].tobytes() == _logits(self._last[i]).tobytes()
            self.prefill_is_decode &= same

    def side(self, kind: str, dtype: str) -> Side:
        prompts = range(len(self._reference))
        texts = [len({c.tokens[i] for c in self.configurations}) for i in prompts]
        spread = [(self._high[i] - self._low[i]).max(axis=-1)[: self._agreed[i]] for i in prompts]
        of_mesh: dict[int, set[tuple[str, ...]]] = {}
        for c in self.configurations:
            of_mesh.setdefault(c.tp, set()).add(c.digests)
        return Side(
            numerics=kind,
            dtype=dtype,
            configurations=tuple(self.configurations),
            unique_outputs=float(np.mean(texts)),
            logit_digests=len({c.digests for c in self.configurations}),
            mean_divergence=float(np.mean(np.concatenate(spread))),
            max_divergence=float(np.max(np.concatenate(spread))),
            prefill_is_decode=self.prefill_is_decode,
            batch_is_alone=(
                all(len(found) == 1 for found in of_mesh.values())
                if len({c.batch for c in self.configurations}) > 1
                else None
            ),
        )


def _logits(g: Generation) -> npt.NDArray[Any]:
    assert g.logits is not None
    return g.logits
