"""Bodies of requests: read within a limit, and fields checked one by one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect, Request

from star_attention.errors import quote
from star_attention.serve.http.problems import Problem, bad_request

_LARGE = 2**18
"""Bytes from which on JSON is parsed beside the event loop, where so many take up to 4 ms."""
_MOST_DEPTH = 100
"""Levels of lists and objects in each other; what reads values further on recurses into them."""
_MOST_DIGITS = 18
_JSON_NAMES: dict[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
MOST_BODY_S = 300.0
"""Seconds in which a body has to come."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def check_length(request: Request, limit: int) -> None:
    """Raise a 413 for a body that says to be longer than allowed."""
    declared = whole_number(request.headers.get("content-length", ""))
    if declared is not None and declared > limit:
        raise body_too_large(f"{declared:,}", limit)


def whole_number(text: str) -> int | None:
    """Return the number that a header or a field of a form has in ASCII digits; None for others."""
    # Other digits, such as a raised 2, are no int; very many of them are slow, or refused.
    is_number = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    return int(text) if is_number else None


def body_too_large(size: str, limit: int) -> Problem:
    """Return the 413 for a body of some size."""
    return Problem(
        413,
        f"the body has {size} bytes, more than the server's {limit:,}; shorten it, or start the"
        " server with a larger --max-body",
        code="request_too_large",
    )


def client_left() -> Problem:
    """Return the 400 for a body that never ended; nobody reads it."""
    return Problem(400, "the client left before its request was complete")


async def read_bytes(request: Request, limit: int) -> bytes:
    """Return a body. No more than the limit is held.

    Raises:
        Problem: 413 for a longer one.
    """
    check_length(request, limit)
    blocks: list[bytes] = []
    size = 0
    async with arriving():
        async for block in request.stream():
            size += len(block)
            if size > limit:
                raise body_too_large(f"more than {limit:,}", limit)
            blocks.append(block)
    return b"".join(blocks)


@contextlib.asynccontextmanager
async def arriving() -> AsyncIterator[None]:
    """Wait for a body in the block, for so long: others need the place of one that never ends.

    Raises:
        Problem: 408 for a body that takes too long, 400 for one that its client has left.
    """
    try:
        async with asyncio.timeout(MOST_BODY_S):
            yield
    except TimeoutError:
        raise Problem(
            408,
            f"the body was not complete after {MOST_BODY_S:g} seconds, the most that it may take;"
            " send a shorter one, or over a faster connection",
            code="body_timeout",
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise client_left() from None


async def read_object(request: Request, limit: int) -> Body:
    """Return a body that is a JSON object.

    Raises:
        Problem: 413 for one beyond the limit, 400 for anything else than an object.
    """
    data = await read_bytes(request, limit)
    parse = parsed if len(data) < _LARGE else _in_thread
    value = parse(data)
    value = await value if asyncio.iscoroutine(value) else value
    if not isinstance(value, dict):
        raise bad_request(
            f"the body is {_JSON_NAMES[type(value)]}; expected a JSON object", code="invalid_json"
        )
    return Body(value)


def parsed(data: bytes, param: str | None = None) -> Any:
    """Return the JSON value of a body, or of a field of a form.

    Args:
        data: the JSON, in UTF-8.
        param: the field's name; None for the body.

    Raises:
        Problem: it is not JSON, or too deep.
    """
    try:
        # Not by the parser, which guesses other encodings.
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise bad_request(
            f"{param or 'the body'} cannot be read as JSON: {_why(error)}; send"
            f" {'it as JSON' if param else 'a JSON object'}",
            param,
            code="invalid_json",
        ) from None
    # Most bodies have too few brackets to be deep.
    if data.count(b"[") + data.count(b"{") > _MOST_DEPTH and _depth(value) > _MOST_DEPTH:
        raise _too_deep()
    return value


def _why(error: ValueError) -> str:
    """Return what is wrong with a body, and no text of it."""
    if isinstance(error, (json.JSONDecodeError, _ConstantError)):
        # It has a place, and no text.
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return "a number has too many digits"


def _depth(value: Any) -> int:
    """Return the levels of lists and objects in each other, or one more than allowed."""
    level, depth = [value], 0
    while depth <= _MOST_DEPTH:
        level = [each for each in level if isinstance(each, (list, dict)) and each]
        if not level:
            break
        depth += 1
        level = [
            inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return depth


def _too_deep() -> Problem:
    return bad_request(
        f"the body has more than {_MOST_DEPTH} lists or objects in each other; send a flatter one",
        code="invalid_json",
    )


class _ConstantError(ValueError):
    """A word that only some parsers take for a number."""


def _no_constant(name: str) -> None:
    raise _ConstantError(f"{name} is not a number in JSON")


async def _in_thread(data: bytes) -> Any:
    return await asyncio.to_thread(parsed, data)


class Body:
    """The fields of a JSON object, each taken once; a field that is null counts as absent.

    Args:
        fields: the object.
        names: what the client calls fields that have another name here.

    Attributes:
        fields: those that have not been taken.
        nulls: names of those that are null.
    """

    def __init__(self, fields: dict[str, Any], names: dict[str, str] | None = None) -> None:
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.nulls = fields.keys() - self.fields.keys()
        self.names = names or {}

    def name(self, name: str) -> str:
        """Return what the client calls a field."""
        return self.names.get(name, name)

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field of any type, and count it as taken."""
        return self.fields.pop(name, default)

    def text(self, name: str, default: str | None = None, *, most: int | None = None) -> str | None:
        """Return a str of at most so many characters."""
        value = self.take(name, default)
        if value is None or value is default:
            return default
        if not isinstance(value, str):
            raise wrong_type(self.name(name), value, "a string")
        if most is not None and len(value) > most:
            raise bad_request(
                f"{self.name(name)} has {len(value):,} characters, more than {most:,}; shorten it",
                self.name(name),
            )
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise wrong_type(self.name(name), value, "true or false")
        return value

    def integer(
        self, name: str, default: int | None = None, *, least: int, most: int | None = None
    ) -> int | None:
        """Return an integer within bounds."""
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(self.name(name), value, "an integer")
        if value < least or (most is not None and value > most):
            bound = f"{least:,} or more" if most is None else f"{least:,} to {most:,}"
            raise _out_of_range(self.name(name), value, bound)
        return value

    def number(
        self, name: str, *, least: float, most: float | None = None, default: float | None = None
    ) -> float | None:
        """Return a finite number within bounds."""
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(self.name(name), value, "a number")
        try:
            # Samplers take no integers.
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number < least or (most is not None and number > most):
            bound = f"{least:,.12g}" + (" or more" if most is None else f" to {most:,.12g}")
            raise _out_of_range(self.name(name), value, bound)
        return number

    def object(self, name: str) -> dict[str, Any]:
        """Return an object; {} if it is absent."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise wrong_type(self.name(name), value, "an object")
        return value


def is_id(value: Any) -> bool:
    """True for a number that may be a token id."""
    return isinstance(value, int) and not isinstance(value, bool)


def _out_of_range(name: str, value: float, bound: str) -> Problem:
    return bad_request(f"{name} {quote(value)} is out of range; give {bound}", name)


def missing(name: str, expected: str, body: Body, elsewhere: dict[str, str]) -> Problem:
    """Return the 400 for a field that a request has to have.

    Args:
        name: the field.
        expected: what it has to be.
        body: the request's other fields.
        elsewhere: paths of other requests, by fields that these have.
    """
    hints = [
        f"; {field} is for {path}" for field, path in elsewhere.items() if field in body.fields
    ]
    return bad_request(
        f"{name} is missing: expected {expected}{''.join(hints[:1])}",
        name,
        code="missing_required_parameter",
    )


def wrong_type(name: str, value: Any, expected: str) -> Problem:
    """Return the 400 for a field of another type."""
    return bad_request(f"{name} {quote(value)}: expected {expected}", name, code="invalid_type")
