"""An assertion for tests of bad input: a star_attention error with the right content."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from star_attention.errors import StarAttentionError


def refused(kind: type[Exception], *fragments: str, call: Callable[..., Any]) -> None:
    """Assert that `call` raises `kind` with every fragment in its message."""
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, StarAttentionError)
    assert isinstance(caught.value, ValueError)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in {caught.value}"
