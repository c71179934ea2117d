"""The table of contexts: nothing that a request does depends on contexts of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from star_attention.serve.contexts.entry import Content, Entry
from star_attention.serve.contexts.keys import Scope
from star_attention.serve.contexts.registry import Registry

OWN = Scope(tenant="one")
OTHERS = [Scope(tenant="two"), Scope(tenant="one", salt="other")]
IDS = np.arange(300, dtype=np.int32)


class Sealed:
    """A content that must not be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of another scope's content was read")


def entry(number: int, scope: Scope, content: Any) -> Entry:
    return Entry(
        id=f"ctx_{number}",
        key=b"key",
        scope=scope,
        content=content,
        tokens=300,
        nbytes=1,
        created_at=0.0,
        last_used_at=0.0,
    )


@pytest.fixture
def registry() -> Registry:
    filled = Registry()
    for number, scope in enumerate(OTHERS):
        filled.add(entry(number, scope, Sealed()))
    return filled


def test_contexts_of_other_scopes_are_never_looked_at(registry: Registry) -> None:
    text = Content(ids=IDS, text="a text " * 99)
    own = entry(9, OWN, text)
    for holds in (False, True):
        if holds:
            registry.add(own)
        assert registry.find(b"key", OWN, IDS) is (own if holds else None)
        assert registry.of_text(OWN, text) is (text if holds else None)
        longer = Content(ids=np.arange(301, dtype=np.int32), text="a text " * 100)
        assert registry.prefix_of(OWN, longer) is (own if holds else None)
        assert registry.shared_text(OWN, longer) == (693 if holds else 0)
        assert registry.ends_alike(OWN, IDS) is holds
        assert registry.nearest(OWN, IDS, 100) == (None, 0)
    registry.forget(own)
    assert registry.find(b"key", OWN, IDS) is None
    assert registry.of_text(OWN, text) is None
    assert len(registry) == len(OTHERS)
