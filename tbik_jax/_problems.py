"""Collect every violation of a request, then fail once."""

from __future__ import annotations

from types import TracebackType


class Problems:
    """Gather violations and raise them together, before any compute.

    Used as a context manager: the block records what is wrong with :meth:`check` and :meth:`add`; leaving the block
    raises one error that lists all of it. A user then mends everything in one go.

    >>> with Problems("dense.row_parallel") as problems:
    ...     problems.check(k % leaves == 0, f"K = {k} is not a multiple of the {leaves} leaves; choose leaves that divide it")

    ``unsupported`` marks what this backend cannot do (``NotImplementedError``) apart from what the caller got wrong
    (``ValueError``); if both occur, the caller's mistakes decide the type and both are listed.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._wrong: list[str] = []
        self._unsupported: list[str] = []

    def add(self, message: str) -> None:
        self._wrong.append(message)

    def unsupported(self, message: str) -> None:
        self._unsupported.append(message)

    def check(self, condition: bool, message: str) -> bool:
        """Record ``message`` unless ``condition`` holds; returns the condition so that dependent checks can be skipped."""
        if not condition:
            self._wrong.append(message)
        return bool(condition)

    def __bool__(self) -> bool:
        return bool(self._wrong or self._unsupported)

    def raise_if_any(self) -> None:
        if not self:
            return
        found = self._wrong + self._unsupported
        head = f"{self._where}: {len(found)} problem{'s' if len(found) > 1 else ''}"
        text = "\n".join([head, *(f"  - {message}" for message in found)])
        raise ValueError(text) if self._wrong else NotImplementedError(text)

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.raise_if_any()
