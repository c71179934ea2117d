"""Every answer that is not a success, in the envelope that OpenAI's clients read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    MissingPackageError,
    NonFiniteError,
    OutOfMemoryError,
    RankError,
    StarAttentionError,
    UnknownOptionError,
    UnsupportedCallError,
)
from star_attention.serve.jobs import EngineEndedError
from star_attention.serve.refusals import RefusalError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat a request after an error of the server's, unless this says no."""


class Problem(Exception):  # noqa: N818 (it is an answer, not a defect)
    """A request that is not answered as it asks.

    Attributes:
        status: the HTTP status.
        message: what is wrong: value, limit, remedy.
        code: a word for programs.
        param: the field at fault, None for no single one.
        headers: headers of the answer.
        tokens: of a prompt that is too long: those it takes with its answer, and the most; None for
            other problems.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        self.tokens: tuple[int, int] | None = None

    @property
    def envelope(self) -> dict[str, Any]:
        """The body of the answer, in OpenAI's form."""
        by_side = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, by_side)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def anthropic_envelope(problem: Problem, request_id: str) -> dict[str, Any]:
    """Return the body of the answer in Anthropic's form."""
    message = problem.message
    if problem.tokens is not None:
        # Clients recognize it by these words.
        asked, most = problem.tokens
        message = f"prompt is too long: {asked} tokens > {most} maximum. {message}"
    kind = _ANTHROPIC_TYPES.get(problem.status, "invalid_request_error")
    error = {"type": kind, "message": message, "param": problem.param, "code": problem.code}
    return {"type": "error", "error": error, "request_id": request_id}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """Return a 400."""
    return Problem(400, message, param=param, code=code or "invalid_value")


def not_supported(param: str, value: str, remedy: str) -> Problem:
    """Return a 400 for a field that would change the answer, and that this server cannot serve."""
    return bad_request(
        f"{param} {value} is not supported; {remedy}", param=param, code="unsupported_value"
    )


def busy(message: str, *, retry_after_s: int = 5) -> Problem:
    """Return a 429: the request may work later."""
    headers = {"retry-after": str(retry_after_s)}
    return Problem(429, message, code="too_many_requests", headers=headers)


def unavailable(message: str, code: str, *, retry_after_s: int = 10) -> Problem:
    """Return a 503: the server starts, ends, or has failed."""
    return Problem(503, message, code=code, headers={"retry-after": str(retry_after_s)})


def timed_out(seconds: float) -> Problem:
    """Return a 504 for a request that took longer than it may."""
    return Problem(
        504,
        f"the request took longer than {seconds:g} seconds, the server's limit; ask for a shorter"
        " answer, or keep the document as a context first",
        code="request_timeout",
        headers=_NO_RETRY,
    )


def too_long(
    limit: int, prompt_tokens: int, answer_tokens: int, *, param: str, limited_by: str
) -> Problem:
    """Return the 400 for a prompt without room for its answer.

    Clients recognize it by its code, and some by its first words.

    Args:
        limit: positions of the model.
        prompt_tokens, answer_tokens: what is asked for.
        param: the field of the prompt.
        limited_by: the field of the answer's limit.
    """
    asked = prompt_tokens + answer_tokens
    problem = bad_request(
        f"This model's maximum context length is {limit} tokens. For its answer the prompt is too"
        f" long: {asked} tokens, {prompt_tokens} of the prompt and {answer_tokens} of the answer."
        f" Shorten the prompt, or lower {limited_by}.",
        param=param,
        code="context_length_exceeded",
    )
    problem.tokens = asked, limit
    return problem


def of_error(error: BaseException, *, request_id: str) -> Problem:
    """Return the answer for an exception; of a defect it shows only the request's id."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ContextLengthError):
        return bad_request(str(error), "messages", "context_length_exceeded")
    if isinstance(error, RefusalError):
        # Only files that do not fit are an error of the server's that lasts.
        headers = _NO_RETRY if error.status == 507 else None
        return Problem(
            error.status, str(error), code=error.code, param=error.param, headers=headers
        )
    if isinstance(error, EngineEndedError):
        return unavailable(str(error), "shutting_down")
    if isinstance(error, MissingPackageError):
        return bad_request(str(error), code="unsupported_value")
    if isinstance(error, InvalidInputError | UnknownOptionError | UnsupportedCallError):
        return bad_request(str(error))
    if isinstance(error, OutOfMemoryError):
        return Problem(500, str(error), code="out_of_memory", headers=_NO_RETRY)
    if isinstance(error, NonFiniteError):
        return Problem(500, str(error), code="model_error", headers=_NO_RETRY)
    if isinstance(error, RankError):
        return unavailable(str(error), "rank_failed")
    if isinstance(error, StarAttentionError):
        return Problem(500, str(error), code="server_error")
    return Problem(
        500,
        f"the server failed ({type(error).__name__}); its log has more under request {request_id}",
        code="server_error",
    )


@contextlib.contextmanager
def about(param: str) -> Iterator[None]:
    """Say that an error of the block is about a field, unless it names one itself.

    Raises:
        Problem: what the block refuses, with the field.
    """
    try:
        yield
    except (InvalidInputError, MissingPackageError) as error:
        problem = of_error(error, request_id="")
        own = getattr(error, "param", None)
        problem.param = own or param
        raise problem from error
