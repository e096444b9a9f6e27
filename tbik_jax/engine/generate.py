"""Generate and score with one model on one mesh: the same functions, whatever the mesh and the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tbik_jax import dense
from tbik_jax._problems import Problems
from tbik_jax.collectives import for_mesh
from tbik_jax.emulate import emulate
from tbik_jax.engine.sampling import Sampling, sample
from tbik_jax.models.linear import DATA, TENSOR
from tbik_jax.models.transformer import Block, KVCache, Transformer
from tbik_jax.numerics import Invariant

Array = jax.Array

#: Prompts are padded to multiples of this many tokens, so that few shapes are compiled. Performance-only.
_PROMPT_MULTIPLE = 32


def make_mesh(tp: int = 1, dp: int = 1) -> Mesh:
    """A mesh of ``dp`` x ``tp`` of the first devices.

    Raises:
        ValueError: more ranks than devices.
    """
    devices = jax.devices()
    with Problems("make_mesh") as problems:
        problems.check(tp >= 1 and dp >= 1, f"tp = {tp}, dp = {dp}; both are at least 1")
        problems.check(
            tp * dp <= len(devices),
            f"a mesh of dp {dp} x tp {tp} wants {tp * dp} devices, and there are {len(devices)} "
            f"({devices[0].platform}). On the CPU, set jax.config.update('jax_num_cpu_devices', {tp * dp}) before JAX's "
            f"first use; the command line does so itself",
        )
    return Mesh(np.array(devices[: tp * dp]).reshape(dp, tp), (DATA, TENSOR))


@dataclass(frozen=True)
class Generation:
    """What came of one prompt."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    #: ``[len(tokens), V]`` f32: the logits that each token was chosen from; None unless asked for.
    logits: np.ndarray | None = field(default=None, repr=False, compare=False)
    #: ``[len(tokens)]`` f32: the log-probability of each token, under the model itself; None unless asked for.
    log_probs: np.ndarray | None = field(default=None, repr=False, compare=False)


class Step(NamedTuple):
    """The next token of every prompt, with what it was chosen from, if asked for; see :class:`Generation`."""

    tokens: Any  #: ``[B]``
    logits: Any  #: ``[B, V]``
    log_probs: Any  #: ``[B]``


class Generator:
    """Prefill and decode steps of a model, compiled for a mesh of (DATA, TENSOR).

    Args:
        model: On the mesh, see :func:`tbik_jax.models.loading.load`.
        mesh: The mesh it was loaded on.
        pack: Lay the weights out for inference first (performance-only; the model is changed in place).
        unroll: Give every layer its own arrays instead of scanning a stack (performance-only; the model is changed in place).
            By default on GPUs, whose kernels would read copies.
        emulate: Run a model of several tensor-parallel ranks on a mesh of one device, rank after rank
            (:func:`tbik_jax.emulate`): slow, and the bits of that many devices.

    Where the model's numerics leave the collectives' algorithm to ``"auto"``, it is chosen for this mesh
    (:func:`tbik_jax.collectives.for_mesh`; performance-only).

    Guarantee (invariant numerics): the tokens and logits of a prompt depend on the prompt, its seed, the sampling settings
    and the model's contract; not on the mesh, the batch, or which prompts run beside it.

    Raises:
        ValueError: a mesh without these two axes, or with another number of tensor-parallel ranks than the model's.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        *,
        pack: bool = True,
        unroll: bool | None = None,
        emulate: bool = False,
    ) -> None:
        with Problems("Generator") as problems:
            for axis in (DATA, TENSOR):
                problems.check(
                    axis in mesh.shape,
                    f"the mesh has axes {tuple(mesh.shape)}; one must be {axis!r}, of size 1 if need be",
                )
            ranks = mesh.shape.get(TENSOR, model.layout.ranks)
            if emulate:
                problems.check(mesh.size == 1, f"emulate=True wants a mesh of one device, and this has {mesh.size}")
            else:
                problems.check(
                    ranks == model.layout.ranks,
                    f"the model was loaded for {model.layout.ranks} tensor-parallel ranks, and the mesh has {ranks}; "
                    "emulate=True runs any number of ranks on a mesh of one device",
                )
        if pack and not emulate:
            model.pack(mesh)
        if unroll is None:  # emulated ranks copy their slices anyway
            unroll = jax.default_backend() == "gpu" and not emulate
        if unroll:
            model.unstack(mesh)
        if isinstance(model.numerics, Invariant) and model.numerics.algorithm == "auto" and not emulate:
            model.numerics = replace(model.numerics, algorithm=for_mesh(mesh, TENSOR))
        self._stacked, self._emulated = isinstance(model.blocks, Block), emulate
        self.config, self.numerics, self.mesh = model.config, model.numerics, mesh
        self._dtype = model.dtype
        self._graph, self._state = nnx.split(model)
        self._specs = jax.tree.map(
            lambda v: v.replace(v.get_metadata()["spec"]), self._state, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        self._ranks, self._kv_heads = model.layout.ranks, model.layout.ranks * model.layout.local_kv_heads

    # Compiled programs -------------------------------------------------------------------------------------------------

    def _compile(
        self, f: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any, *, donate: int | None = None
    ) -> Callable[..., Any]:
        def run(state: Any, *args: Any) -> Any:
            return f(nnx.merge(self._graph, state), *args)

        in_specs = (self._specs, *in_specs)
        if self._emulated:
            in_specs, out_specs = (_without_data(specs) for specs in (in_specs, out_specs))
            return emulate(run, ranks=self._ranks, axis_name=TENSOR, in_specs=in_specs, out_specs=out_specs)
        # Types that name mesh axes are for gradients; there are none here, and `dense.write_kv` has no kernel for them.
        sharded = jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(sharded, donate_argnums=() if donate is None else donate)

    @cached_property
    def _score(self) -> Callable[..., Array]:
        def f(model: Transformer, tokens: Array) -> Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            return model(tokens, positions)[0]

        return self._compile(f, (P(DATA),), P(DATA))

    @cached_property
    def _log_probs(self) -> Callable[..., Array]:
        def f(model: Transformer, tokens: Array, labels: Array) -> Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            return -model.cross_entropy(tokens, positions, labels)

        return self._compile(f, (P(DATA), P(DATA)), P(DATA))

    @cached_property
    def _extend(self) -> Callable[..., tuple[Array, KVCache]]:
        """All logits of a piece of the context, given what came before."""

        def f(model: Transformer, tokens: Array, first: Array, cache: KVCache) -> tuple[Array, KVCache]:
            positions = first[:, None] + jnp.arange(tokens.shape[1])
            logits, cache = model(tokens, positions, cache)  # type: ignore[assignment]
            return logits, cache

        of_cache = KVCache.spec(stacked=self._stacked)
        return self._compile(f, (P(DATA), P(DATA), of_cache), (P(DATA), of_cache), donate=3)

    @cached_property
    def _steps(self) -> dict[Any, tuple[Callable[..., Any], Callable[..., Any]]]:
        return {}

    def _compiled(
        self, sampling: Sampling, *, with_log_probs: bool = False
    ) -> tuple[Callable[..., tuple[Step, KVCache]], Callable[..., tuple[Step, KVCache]]]:
        """Prefill and decode: ``(state, tokens, lengths or positions, seeds, cache) -> (step, cache)``."""

        def step(model: Transformer, local: Array, seeds: Array, positions: Array) -> Step:
            local = local[:, 0]
            logits = dense.gather_logits(local, model.vocabulary)
            tokens = sample(logits, seeds, positions, sampling)
            losses = model.numerics.cross_entropy(local, tokens, model.vocabulary) if with_log_probs else None
            return Step(tokens, logits, None if losses is None else -losses)

        def prefill(
            model: Transformer, tokens: Array, lengths: Array, seeds: Array, cache: KVCache
        ) -> tuple[Step, KVCache | None]:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            local, after = model.local_logits(tokens, positions, cache, lengths - 1)
            return step(model, local, seeds, lengths), after

        def decode(
            model: Transformer, tokens: Array, positions: Array, seeds: Array, cache: KVCache
        ) -> tuple[Step, KVCache | None]:
            local, after = model.local_logits(tokens[:, None], positions[:, None], cache)
            return step(model, local, seeds, positions + 1), after

        kind = sampling, with_log_probs
        if kind not in self._steps:
            of_cache = KVCache.spec(stacked=self._stacked)
            specs = P(DATA), P(DATA), P(DATA), of_cache
            outs = Step(P(DATA), P(DATA), P(DATA) if with_log_probs else None), of_cache
            self._steps[kind] = tuple(  # type: ignore[assignment]
                self._compile(f, specs, outs, donate=4) for f in (prefill, decode)
            )
        return self._steps[kind]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """A finite cache for ``capacity`` positions, rounded up to whole attention blocks."""
        block = self.numerics.contract.kv_block
        shape = (batch, self._kv_heads, -(-capacity // block) * block, self.config.head_dim)
        spec = KVCache.spec(stacked=self._stacked).k

        def zeros(*lead: int) -> Array:
            return jnp.zeros((*lead, *shape), self._dtype, device=NamedSharding(self.mesh, spec))

        layers = self.config.num_layers
        if self._stacked:
            return KVCache(zeros(layers), zeros(layers))
        return KVCache(tuple(zeros() for _ in range(layers)), tuple(zeros() for _ in range(layers)))

    # What users call ---------------------------------------------------------------------------------------------------

    def score(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits ``[len(prompt), V]`` f32 of every position of every prompt, in one full-sequence forward."""
        self._check("score", prompts).raise_if_any()
        batch, lengths = self._batch(prompts)
        logits = np.asarray(self._score(self._state, batch))
        return [logits[i, :n] for i, n in enumerate(lengths[: len(prompts)])]

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """``log p(token | the tokens before it)``, f32 ``[len(sequence) - 1]``: of every token but the first.

        Guarantee: the bits of ``-``:meth:`Transformer.cross_entropy <tbik_jax.models.transformer.Transformer.cross_entropy>`
        on a trainer's mesh, and of :meth:`generate`'s ``log_probs`` for the tokens that it chose.
        """
        self._check("log_probs", sequences).raise_if_any()
        batch, lengths = self._batch(sequences)
        labels = np.pad(batch[:, 1:], ((0, 0), (0, 1)))
        found = np.asarray(self._log_probs(self._state, batch, labels))
        return [found[i, : n - 1] for i, n in enumerate(lengths[: len(sequences)])]

    def score_in_chunks(self, prompts: Sequence[Sequence[int]], chunk: int) -> list[np.ndarray]:
        """The same logits, computed ``chunk`` positions at a time through the KV cache; ``chunk=1`` is decoding."""
        with self._check("score_in_chunks", prompts) as problems:
            problems.check(chunk >= 1, f"chunk = {chunk}; it is at least 1")
        batch, lengths = self._batch(prompts)
        size = -(-batch.shape[1] // chunk) * chunk
        batch = np.pad(batch, ((0, 0), (0, size - batch.shape[1])))
        cache = self.new_cache(len(batch), size)
        parts = []
        for start in range(0, size, chunk):
            first = np.full(len(batch), start, np.int32)
            logits, cache = self._extend(self._state, batch[:, start : start + chunk], first, cache)
            parts.append(np.asarray(logits))
        joined = np.concatenate(parts, axis=1)
        return [joined[i, :n] for i, n in enumerate(lengths[: len(prompts)])]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seeds: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        with_logits: bool = False,
        with_log_probs: bool = False,
    ) -> Iterator[Step]:
        """Step by step, until every prompt has met a stop token.

        Takes what :meth:`generate` takes and raises what it raises, at the call.
        """
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        with self._check("generate", prompts, max_new_tokens) as problems:
            problems.check(len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts")
            wrong = [seed for seed in seeds if not _is_index(seed, 2**32)]
            problems.check(not wrong, f"seeds are integers in 0..2**32-1; these are not: {wrong[:5]}")
        stop = list(() if stop is None else stop)
        return self._stream(prompts, max_new_tokens, sampling or Sampling(), seeds, stop, with_logits, with_log_probs)

    def _stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: list[int],
        stop: list[int],
        with_logits: bool,
        with_log_probs: bool,
    ) -> Iterator[Step]:
        if max_new_tokens == 0:
            return
        prefill, decode = self._compiled(sampling, with_log_probs=with_log_probs)
        tokens, lengths = self._batch(prompts)
        count = len(tokens)
        seeds_of = np.array(seeds + [0] * (count - len(prompts)), np.uint32)
        cache = self.new_cache(count, max(tokens.shape[1], max(lengths) + max_new_tokens))
        ended = np.array([i >= len(prompts) for i in range(count)])
        last, cache = prefill(self._state, tokens, np.array(lengths, np.int32), seeds_of, cache)
        for number in range(max_new_tokens):
            kept = Step(last.tokens, last.logits if with_logits else None, last.log_probs)
            host = jax.tree.map(np.asarray, kept)
            yield jax.tree.map(lambda x: x[: len(prompts)], host)
            ended |= np.isin(host.tokens, stop)
            if ended.all() or number + 1 == max_new_tokens:
                return
            positions = np.array(lengths, np.int32) + number
            last, cache = decode(self._state, last.tokens, positions, seeds_of, cache)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seeds: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        with_logits: bool = False,
        with_log_probs: bool = False,
    ) -> list[Generation]:
        """Continue every prompt, up to and including its first ``stop`` token.

        Args:
            prompts: Token ids, as one batch of any size.
            max_new_tokens: At most so many per prompt.
            sampling: Greedy by default.
            seeds: One per prompt, by default 0, 1, 2, ...
            with_logits: Keep the logits of every step.
            with_log_probs: Keep the log-probability of every token: the model's own, whatever the temperature.

        Raises:
            ValueError: an empty prompt, an unknown token id, more tokens than the model's context.
        """
        how = {"seeds": seeds, "stop": stop, "with_logits": with_logits, "with_log_probs": with_log_probs}
        steps = list(self.stream(prompts, max_new_tokens, sampling, **how))  # type: ignore[arg-type]
        results = []
        for i, prompt in enumerate(prompts):
            tokens = [int(step.tokens[i]) for step in steps]
            ends = [at for at, token in enumerate(tokens) if token in set(() if stop is None else stop)]
            count = ends[0] + 1 if ends else len(tokens)
            logits = log_probs = None
            if with_logits:
                rows = [step.logits[i] for step in steps[:count]]
                logits = np.array(rows, np.float32).reshape(count, self.config.vocab_size)
            if with_log_probs:
                log_probs = np.array([step.log_probs[i] for step in steps[:count]], np.float32)
            results.append(Generation(tuple(prompt), tuple(tokens[:count]), logits, log_probs))
        return results

    # Checks --------------------------------------------------------------------------------------------------------------

    def _check(self, where: str, prompts: Sequence[Sequence[int]], new: int = 0) -> Problems:
        """What is wrong with a request, for the caller to add to and to raise."""
        vocabulary, context = self.config.vocab_size, self.config.max_position_embeddings
        problems = Problems(where)
        problems.check(len(prompts) > 0, "no prompts")
        problems.check(new >= 0, f"max_new_tokens = {new} is negative")
        for i, prompt in enumerate(prompts):
            problems.check(len(prompt) > 0, f"prompt {i} is empty; give at least one token (a BOS token, say)")
            problems.check(
                len(prompt) + new <= context,
                f"prompt {i} has {len(prompt)} tokens and {new} more are asked for; the model's context is {context}",
            )
            unknown = [token for token in prompt if not _is_index(token, vocabulary)]
            problems.check(
                not unknown, f"prompt {i}: token ids are integers in 0..{vocabulary - 1}; these are not: {unknown[:5]}"
            )
        return problems

    def _batch(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, list[int]]:
        """Right-padded tokens, rows filled up to the data-parallel size."""
        rows = -(-len(prompts) // self.mesh.shape[DATA]) * self.mesh.shape[DATA]
        width = -(-max(map(len, prompts)) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
        tokens = np.zeros((rows, width), np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
        return tokens, [len(p) for p in prompts] + [1] * (rows - len(prompts))


def _is_index(value: Any, size: int) -> bool:
    """An integer of any kind (a float would be cut without a word), in 0..size-1."""
    return hasattr(value, "__index__") and 0 <= value < size


def _without_data(specs: Any) -> Any:
    """Specs of a mesh whose DATA axis has one rank, without it."""

    def one(spec: P) -> P:
        return P(*(None if axis == DATA else axis for axis in spec))

    return jax.tree.map(one, specs, is_leaf=lambda x: isinstance(x, P))
