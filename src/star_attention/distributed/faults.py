"""The reason why ranks cannot continue."""

from __future__ import annotations

from dataclasses import dataclass

from star_attention import errors
from star_attention.errors import RankError


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The reason why the ranks cannot continue.

    rank: the rank at fault; None if no single rank is at fault. name, message: type and text of
    the exception, if the rank raised one.
    """

    rank: int | None
    where: str
    cause: str
    name: str | None = None
    message: str = ""

    @property
    def is_exception(self) -> bool:
        return self.name is not None

    def as_error(self) -> BaseException:
        """Return the rank's own exception if it raised one that users know, else a `RankError`."""
        if self.name is None:
            return RankError(self.rank, self.where, self.cause)
        message = f"{self.message} (on rank {self.rank}, in {self.where})"
        return errors.rebuild(self.name, message, None, self.rank)
