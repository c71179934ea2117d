"""Which responses are kept, and whose are dropped first."""

from __future__ import annotations

import pytest

from star_attention.serve.http.responses.kept import KeptResponse, KeptResponses
from star_attention.serve.refusals import RefusalError


def kept(tenant: str, id: str, length: int = 10) -> KeptResponse:
    response = {"id": id, "status": "completed", "output": []}
    return KeptResponse(
        tenant=tenant, response=response, messages=["x" * length], context=None, answering=None
    )


def test_the_oldest_responses_of_a_tenant_are_dropped() -> None:
    responses = KeptResponses(2, 1000)
    for tenant, id in (("ann", "1"), ("bob", "2"), ("ann", "3"), ("ann", "4")):
        responses.add(kept(tenant, id))
    assert list(responses.of_tenant("ann")) == ["3", "4"]
    assert list(responses.of_tenant("bob")) == ["2"]


def test_who_has_most_loses_responses_first() -> None:
    """Forbids that one client's documents drop the conversations of another one."""
    responses = KeptResponses(100, 5500)
    responses.add(kept("bob", "b", 1000))
    for number in range(6):
        responses.add(kept("ann", f"a{number}", 1000))
    assert list(responses.of_tenant("bob")) == ["b"]
    assert list(responses.of_tenant("ann")) == ["a2", "a3", "a4", "a5"]
    with pytest.raises(RefusalError):
        responses.get("ann", "a1")
