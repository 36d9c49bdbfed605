"""Communication under way: what is asked for now and taken later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

__all__ = ["Pending"]

T = TypeVar("T")
U = TypeVar("U")


class Pending(Generic[T]):
    """Communication under way. `wait()` gives the result, the same one each time.

    Where the result `is_lent` it lies in memory that later messages write: `read` it instead.
    """

    def __init__(
        self,
        works: Sequence[Any],
        finish: Callable[[], T],
        *,
        keep: Any = None,
        give_back: Callable[[], None] | None = None,
    ) -> None:
        self._works: Sequence[Any] = works
        self._give_back, self.is_lent = give_back, give_back is not None
        self._finish: Callable[[], T] | None = finish
        self._keep = keep  # what is being sent must live until it has been sent
        self._result: T | None = None

    def wait(self) -> T:
        """Wait (on CUDA: make the current stream wait) and return the result."""
        if self._finish is not None:
            for work in self._works:
                work.wait()
            self._result = self._finish()
            self._works, self._finish, self._keep = (), None, None
        return self._result  # type: ignore[return-value]

    def read(self, use: Callable[[T], U]) -> U:
        """`use(result)`, once, before the group's next exchange is posted.

        What it queues on the current stream may read the result, nothing after it may.
        """
        used = use(self.wait())
        if self._give_back is not None:
            self._give_back()
        return used
