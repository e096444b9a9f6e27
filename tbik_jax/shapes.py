"""Matrix products of known models: which sizes a rank multiplies, and in how many leaves. No arrays.

Weights are stored ``[n, k]``; a product of m rows is ``x [m, k] -> [m, n]``. Column-parallel products cut n between the
ranks and have one leaf. Row-parallel products cut k in the contract's leaves, of which a rank holds its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tbik_jax.contract import Contract

#: What is multiplied, over the letters m (rows), n (columns), l (leaf), k (contraction inside a leaf).
SPECS = {
    "forward": "mlk,nlk->mn",  # x, w
    "weight-gradient": "lkm,lkn->mn",  # dy, x: leaves of tokens
    "input-gradient": "mlk,lkn->mn",  # dy, w: leaves of the weight's rows
}
TENSOR_PARALLEL = (1, 2, 4, 8)
PRODUCTS = ("qkv", "attention_out", "gate_up", "down", "lm_head")
_ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelShape:
    """The sizes in a model's public configuration that decide its products."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


MODELS = {
    "qwen3-8b": ModelShape(4096, 12288, 32, 8, 128, 151936),
    "llama-3.1-8b": ModelShape(4096, 14336, 32, 8, 128, 128256),
    "qwen3-32b": ModelShape(5120, 25600, 64, 8, 128, 151936),
    "smollm2-135m": ModelShape(576, 1536, 9, 3, 64, 49152),
}


@dataclass(frozen=True)
class ProductShape:
    """One product of one model on one of ``tp`` ranks.

    Attributes:
        model: A key of :data:`MODELS`.
        name: One of :data:`PRODUCTS`; ``qkv`` and ``gate_up`` are the products of one input, side by side.
        tp: Tensor-parallel size.
        n: Output columns on the rank.
        k: The contraction on the rank, all its leaves together.
        leaves: How many leaves the rank's contraction has.
        parallel: What the ranks share out: ``column`` n, ``row`` k.
    """

    model: str
    name: str
    tp: int
    n: int
    k: int
    leaves: int
    parallel: Literal["column", "row"]

    def flops(self, m: int) -> int:
        """Of m rows, a multiply-add being two."""
        return 2 * m * self.n * self.k

    def bytes(self, m: int, dtype: str) -> int:
        """Both operands and the result, each once."""
        return (m * self.k + self.n * self.k + m * self.n) * item_bytes(dtype)

    def __str__(self) -> str:
        return f"{self.model} {self.name} tp{self.tp}"


@dataclass(frozen=True)
class Product:
    """What a kernel is given: a shape, its number of rows (tokens), and the leaves of what is contracted.

    Attributes:
        direction: A key of :data:`SPECS`.
        shape: Of the layer.
        m: Tokens.
        leaves: Of the contraction: k forward, the tokens in the weight gradient, n in the input gradient.
    """

    direction: str
    shape: ProductShape
    m: int
    leaves: int

    def __post_init__(self) -> None:
        if self.direction not in SPECS:
            raise ValueError(f"direction {self.direction!r}: choose from {', '.join(SPECS)}")
        if self.contraction % self.leaves:
            raise ValueError(f"{self.leaves} leaves do not divide the contraction of {self.contraction} in {self}")

    @property
    def spec(self) -> str:
        return SPECS[self.direction]

    @property
    def contraction(self) -> int:
        return {"forward": self.shape.k, "weight-gradient": self.m, "input-gradient": self.shape.n}[self.direction]

    @property
    def stored(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of both operands as a layer holds them: tokens first, weights ``[n, k]``."""
        x, w, dy = (self.m, self.shape.k), (self.shape.n, self.shape.k), (self.m, self.shape.n)
        return {"forward": (x, w), "weight-gradient": (dy, x), "input-gradient": (dy, w)}[self.direction]

    @property
    def by_leaf(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of :attr:`stored` with the contraction cut in leaves, which moves no value."""
        sizes = {"l": self.leaves, "k": self.contraction // self.leaves}
        cut = []
        for letters, (rows, columns) in zip(self.spec.split("->")[0].split(","), self.stored, strict=True):
            free = columns if letters.startswith("l") else rows
            cut.append(tuple(sizes.get(letter, free) for letter in letters))
        return cut[0], cut[1]

    @property
    def result(self) -> tuple[int, int]:
        m, n, k = self.m, self.shape.n, self.shape.k
        return {"forward": (m, n), "weight-gradient": (n, k), "input-gradient": (m, k)}[self.direction]

    def __str__(self) -> str:
        return f"{self.direction} {self.shape} m={self.m}"


def item_bytes(dtype: str) -> int:
    """Bytes of one value.

    Raises:
        ValueError: a dtype that no product takes.
    """
    if dtype not in _ITEM:
        raise ValueError(f"dtype {dtype!r}: choose from {', '.join(_ITEM)}")
    return _ITEM[dtype]


def shape(model: str, name: str, tp: int = 1, contract: Contract | None = None) -> ProductShape:
    """The shape of a product.

    >>> shape("qwen3-8b", "down", 2)
    ProductShape(model='qwen3-8b', name='down', tp=2, n=4096, k=6144, leaves=4, parallel='row')

    Raises:
        ValueError: an unknown model or product, or a ``tp`` that does not divide its heads, columns or leaves.
    """
    for given, known, what in ((model, tuple(MODELS), "model"), (name, PRODUCTS, "product")):
        if given not in known:
            raise ValueError(f"{what} {given!r}: choose from {', '.join(known)}")
    of, contract = MODELS[model], contract or Contract()
    # (n, k, what the ranks share out in whole units)
    n, k, units = {
        "qkv": ((of.heads + 2 * of.kv_heads) * of.head_dim, of.hidden, of.kv_heads),
        "attention_out": (of.hidden, of.heads * of.head_dim, of.heads),
        "gate_up": (2 * of.intermediate, of.hidden, of.intermediate),
        "down": (of.hidden, of.intermediate, of.intermediate),
        "lm_head": (of.vocabulary, of.hidden, of.vocabulary),
    }[name]
    if name in ("attention_out", "down"):
        leaves = contract.leaves_for(units)
        _divides(tp, leaves, f"{leaves} leaves of {model}'s {name}")
        return ProductShape(model, name, tp, n, k // tp, leaves // tp, "row")
    _divides(tp, units, f"{units} {'KV heads' if name == 'qkv' else 'columns'} of {model}'s {name}")
    return ProductShape(model, name, tp, n // tp, k, 1, "column")


def _divides(tp: int, units: int, what: str) -> None:
    if tp < 1 or units % tp:
        raise ValueError(f"tp = {tp} does not divide the {what}")


def shapes(
    models: tuple[str, ...] = tuple(MODELS),
    names: tuple[str, ...] = PRODUCTS,
    tp: tuple[int, ...] = TENSOR_PARALLEL,
) -> tuple[ProductShape, ...]:
    """Every shape of these models, products and sizes; a size that does not divide a product is left out."""
    found = []
    for model in models:
        for name in names:
            for size in tp:
                try:
                    found.append(shape(model, name, size))
                except ValueError:
                    shape(model, name)  # a name that is wrong at every size is an error
    return tuple(found)
