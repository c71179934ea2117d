"""Refusals that a server answers with a status and a code beside the message."""

from __future__ import annotations

from star_attention.errors import InvalidInputError


class RefusalError(InvalidInputError):
    """A request that is refused for what it asks of the server; a client may see the message.

    Attributes:
        code: what programs tell refusals apart by, such as `context_not_found`.
        status: the HTTP status.
        param: the field of a request at fault, set by who read it; None for none.
    """

    def __init__(self, message: str, *, code: str, status: int = 400) -> None:
        self.code, self.status = code, status
        self.param: str | None = None
        super().__init__(message)
