"""Responses that can be continued: kept in memory, each for its tenant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from star_attention.errors import quote
from star_attention.serve.http.answering import Answering
from star_attention.serve.refusals import RefusalError
from star_attention.serve.values import characters_in


@dataclass(eq=False, kw_only=True)
class KeptResponse:
    """A response and the conversation that led to it.

    Attributes:
        tenant: whose it is.
        response: its object.
        messages: the conversation up to its question, without instructions; then its answer, too.
        context: id of the context that it is about; None for none.
        answering: what generates it; None once it has ended.
    """

    tenant: str
    response: dict[str, Any]
    messages: list[Any]
    context: str | None
    answering: Answering | None
    characters: int = field(init=False)

    def __post_init__(self) -> None:
        # The fields of its request that come back with it may be as long as a document.
        self.characters = characters_in(self.messages, self.response)


class KeptResponses:
    """The responses of all tenants; the oldest ones are dropped first.

    Args:
        most: most responses of a tenant.
        most_characters: most characters of all responses and their conversations; those that share
            messages count each.
    """

    def __init__(self, most: int, most_characters: int) -> None:
        self._most, self._most_characters = most, most_characters
        self._kept: dict[str, dict[str, KeptResponse]] = {}

    def add(self, kept: KeptResponse) -> None:
        """Keep a response."""
        own = self._kept.setdefault(kept.tenant, {})
        own[kept.response["id"]] = kept
        while len(own) > self._most:
            del own[next(iter(own))]
        while self._characters() > self._most_characters:
            # Nobody loses responses to somebody who has more of them.
            largest = max(self._kept.values(), key=_characters_of)
            del largest[next(iter(largest))]

    def of_tenant(self, tenant: str) -> Iterator[str]:
        """Return the ids of a tenant's responses, the oldest first."""
        return iter(list(self._kept.get(tenant, {})))

    def get(self, tenant: str, id: str) -> KeptResponse:
        """Return a tenant's response.

        Raises:
            RefusalError: it has none of this id.
        """
        kept = self._kept.get(tenant, {}).get(id)
        if kept is None:
            raise _missing(id, "response_not_found")
        return kept

    def conversation(self, tenant: str, id: str) -> KeptResponse:
        """Return a tenant's response that can be continued.

        Raises:
            RefusalError: there is none, or it has no answer.
        """
        kept = self._kept.get(tenant, {}).get(id)
        if kept is None:
            raise _missing(id, "previous_response_not_found")
        status = kept.response["status"]
        if status not in ("completed", "incomplete"):
            raise RefusalError(
                f"the response {quote(id)} has no answer, its status is {status}; continue another"
                " one",
                code="invalid_value",
            )
        return kept

    def item(self, tenant: str, id: str) -> dict[str, Any]:
        """Return an item of a tenant's answers.

        Raises:
            RefusalError: it has none of this id.
        """
        for kept in self._kept.get(tenant, {}).values():
            for item in kept.response["output"]:
                if item["id"] == id:
                    found: dict[str, Any] = item
                    return found
        raise RefusalError(
            f"there is no item {quote(id)}; give the item itself", code="not_found", status=404
        )

    def delete(self, tenant: str, id: str) -> None:
        """Drop a tenant's response."""
        self.get(tenant, id)
        del self._kept[tenant][id]

    def _characters(self) -> int:
        return sum(map(_characters_of, self._kept.values()))


def _missing(id: str, code: str) -> RefusalError:
    return RefusalError(
        f"there is no response {quote(id)}; it was not stored, or it was dropped: send the whole"
        " conversation as input",
        code=code,
        status=404,
    )


def _characters_of(own: dict[str, KeptResponse]) -> int:
    return sum(kept.characters for kept in own.values())
