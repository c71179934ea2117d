"""The text of one answer while it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from star_attention.distributed.comm import Comm
from star_attention.errors import InvalidInputError
from star_attention.generation.following import FollowerRun
from star_attention.generation.result import Delta, Generation
from star_attention.generation.run import GenerationRun
from star_attention.storage.transient import Transient


class Stream(Transient, Iterator[str]):
    """The text of one answer while it is generated, in pieces.

    `for piece in stream` gives the text, `for delta in stream.deltas()` the model's reasoning, too.
    Nothing runs between two pieces, so a stream may be suspended for any time, and other calls on
    the same model may run meanwhile. `close()`, or the end of a `with` block, ends it early; the
    result is then the answer so far. On several ranks rank 0's stream counts: where rank 0 closes
    it, or leaves it for another call, it ends on all ranks.
    """

    _instead_of_pickling = "exhaust it, and take its result"
    _instead_of_deepcopy = "ask again, with the same seed, for a second stream"

    def __init__(self, run: GenerationRun | FollowerRun, comm: Comm) -> None:
        self._run = run
        self._comm = comm
        self._pieces = run.pieces()
        self._failed = False

    def __next__(self) -> str:
        while (delta := self._advance()) is not None:
            if delta.text:
                return delta.text
        raise StopIteration

    def deltas(self) -> Iterator[Delta]:
        """Yield what each step adds: text of the answer (`delta.text`), or `delta.reasoning`.

        All reasoning joined is that of the result, and so is all text.
        """
        while (delta := self._advance()) is not None:
            yield delta

    def _advance(self) -> Delta | None:
        with self._collective():
            return next(self._pieces, None)

    @contextmanager
    def _collective(self, *, closing: bool = False) -> Iterator[None]:
        """Advance the stream on all ranks; after an exception it cannot be advanced again."""
        if self._failed:
            raise InvalidInputError("this stream has failed; ask again")
        try:
            with self._comm.streaming(self._run, closing=closing):
                yield
        except BaseException:
            self._failed = True
            raise

    @property
    def result(self) -> Generation:
        """The whole answer, once the stream has ended.

        Raises:
            InvalidInputError: the stream has not ended.
        """
        if not self._run.ended:
            raise InvalidInputError("the stream has not ended; exhaust it or call close() first")
        return self._run.generations()[0]

    def close(self) -> None:
        """End the answer here."""
        if self._failed:
            return
        with self._collective(closing=True):
            self._pieces.close()
            self._run.finish()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
