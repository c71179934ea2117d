"""Keys of contexts: nothing of one scope, model or secret can be taken for another's."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from star_attention.errors import InvalidInputError
from star_attention.serve.contexts.keys import KeyMaker, Scope, as_ids, identity_digest

FIELDS = st.tuples(
    st.binary(min_size=1, max_size=3),
    st.binary(max_size=3),
    st.text(max_size=3),
    st.text(max_size=3),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3),
)


@settings(deadline=None)
@given(FIELDS, FIELDS)
def test_keys_are_equal_for_equal_fields_alone(a: tuple, b: tuple) -> None:
    """Forbids fields that run into each other: tenant "ab" without salt is not "a" with "b"."""

    def key(secret: bytes, identity: bytes, tenant: str, salt: str, ids: list[int]) -> bytes:
        return KeyMaker(secret, identity).key(Scope(tenant=tenant, salt=salt), as_ids(ids))

    assert (key(*a) == key(*b)) == (a == b)
    secret, identity, tenant, salt, ids = a
    moved = key(secret, identity, tenant + salt, "", ids)
    assert (moved == key(*a)) == (salt == "")


def test_a_seal_is_no_key() -> None:
    maker = KeyMaker(b"secret", b"")
    scope, ids = Scope(tenant="ann"), as_ids([1])
    assert maker.key(scope, ids) != maker.seal("record", b"ann", b"", b"", ids.tobytes())


def test_an_identity_depends_on_every_field_and_not_on_their_order() -> None:
    same = {"a": 1, "b": {"c": None}}
    assert identity_digest(same) == identity_digest(dict(reversed(same.items())))
    assert identity_digest(same) != identity_digest(same | {"b": {"c": 0}})


def test_ids_are_a_copy_that_nobody_changes() -> None:
    source = [5, 6]
    ids = as_ids(source)
    source[0] = 7
    assert ids.tolist() == [5, 6]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_a_long_salt_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"has 1,025 characters; give at most 1,024"):
        Scope(tenant="ann", salt="x" * 1025)
