"""Uploads: a multipart form with one file, read as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from star_attention.serve.documents import Documents
from star_attention.serve.http.body import arriving, body_too_large, check_length
from star_attention.serve.http.events import unless_left
from star_attention.serve.http.problems import Problem, about, bad_request

_MOST_FIELDS = 20


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One uploaded file.

    Attributes:
        name: its name, for messages and lists; it is never opened.
        text: its text.
        nbytes: its size as uploaded.
        fields: the other fields of the form.
    """

    name: str
    text: str
    nbytes: int
    fields: dict[str, str]


def is_form(request: Request) -> bool:
    """True for a body that is a form with files."""
    return request.headers.get("content-type", "").startswith("multipart/form-data")


async def read_upload(request: Request, limit: int, documents: Documents) -> Upload:
    """Return the file of a form, as text.

    Args:
        request: one with a form.
        limit: most bytes of its body.
        documents: reads the file.

    Raises:
        Problem: 413 for a body beyond the limit, 400 for a form without a file that can be read.
    """
    check_length(request, limit)
    limited = Request(request.scope, _limited(request, limit))
    try:
        async with arriving():
            form = await limited.form(max_files=1, max_fields=_MOST_FIELDS)
    except HTTPException as error:
        why = error.detail.rstrip(".")
        raise bad_request(
            f"the form cannot be read: {why}; send one file, in the field `file`, as"
            " multipart/form-data",
            "file",
        ) from None
    except UnicodeError:
        raise _not_utf8() from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise bad_request("the form has no file; send one in the field `file`", "file")
        data = await file.read()
        name = (file.filename or "file")[:255]
        fields = {key: value for key, value in form.items() if isinstance(value, str)}
        "".join([name, *fields, *fields.values()]).encode()
    except UnicodeEncodeError:
        raise _not_utf8() from None
    finally:
        await form.close()
    reading = documents.text_of(data, name, request.state.tenant)
    with about("file"):
        text = await unless_left(request.receive, reading)
    return Upload(name=name, text=text, nbytes=len(data), fields=fields)


def _not_utf8() -> Problem:
    return bad_request("the form has text that is not UTF-8; send its fields in UTF-8", "file")


def _limited(request: Request, limit: int) -> Any:
    """Return a `receive` that raises once a body is longer than the limit."""
    size = 0

    async def receive() -> Any:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise body_too_large(f"more than {limit:,}", limit)
        return message

    return receive
