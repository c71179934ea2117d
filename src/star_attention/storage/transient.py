"""Objects that live in one process: no pickling and no deep copies, with what to do instead."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self


class Transient:
    """Base of objects that hold device memory, or links to a model and to other ranks.

    Pickle would fail on some part of them with a message about that part, or copy gigabytes.
    Shallow copies share everything, and work.
    """

    _instead_of_pickling: ClassVar[str] = "load the model there with StarLLM.from_pretrained"
    _instead_of_deepcopy: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, which would take it to another process;"
            f" {self._instead_of_pickling}"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be copied by copy.deepcopy; {self._instead_of_deepcopy}"
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """A pydantic field takes the object as it is, and looks at no part of it."""
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(cls)

    def __copy__(self) -> Self:
        # `copy.copy` would go through `__reduce_ex__`.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other
