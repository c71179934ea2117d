"""Triton's interpreter without work that it does again for every call of a function of a kernel.

A launch replaces the functions of `triton.language` by interpreted ones, and each call of a
function inside of it looks through all of them once more: a third of the time of our kernels. Each
sum and product of integers is compared with the limits of its type, and nobody reads the result,
since assertions are off: a quarter of what is left. Types of blocks are made anew for each value,
with their names, and a table of all types to look up one: a sixth of what is left then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


def quicken() -> None:
    """Replace the functions once for each launch and language module; look for no overflows."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    # Other versions may do without.
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once(interpreter._patch_lang, interpreter._LangPatchScope)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        unchecked = dataclasses.replace(options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = unchecked
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _once_for_each_type(interpreter._get_np_dtype)
    _share_block_types()


def _once_for_each_type(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found = functools.cache(find)
    from triton.language import core

    def find_once(of: Any) -> Any:
        # The others have no hashes.
        scalar = of.element_ty if isinstance(of, core.block_type) else of
        return found(scalar) if type(scalar) is core.dtype else find(scalar)

    return find_once


def _share_block_types() -> None:
    from triton.language import core

    made: dict[Any, Any] = {}
    block_type, init = core.block_type, core.block_type.__init__

    def key(element_ty: Any, shape: Any) -> Any:
        if type(element_ty) is core.dtype and all(type(size) is int for size in shape):
            return element_ty, *shape
        return None

    def new(cls: Any, element_ty: Any, shape: Any) -> Any:
        return made.get(key(element_ty, shape)) or object.__new__(cls)

    def init_once(self: Any, element_ty: Any, shape: Any) -> None:
        if not vars(self):
            init(self, element_ty, shape)
            if (of := key(element_ty, shape)) is not None:
                made[of] = self

    block_type.__new__, block_type.__init__ = new, init_once


def _once(patch: Callable[[Any], Any], scope_type: type) -> Callable[[Any], Any]:
    from triton import language

    done: set[tuple[bool, ...]] = set()

    # The class is one of Triton's own, found at run time.
    class Launch(scope_type):  # type: ignore[misc]
        """What a launch has replaced: its end puts back the originals."""

        def restore(self) -> None:
            super().restore()
            done.clear()

    @functools.cache
    def modules_of(function: Any) -> tuple[bool, ...]:
        values = function.__globals__.values()
        return tuple(
            any(value is module for value in values) for module in (language, language.core)
        )

    def patch_once(function: Any) -> Any:
        modules = modules_of(function)
        if modules in done:
            return scope_type()
        launch, scope = Launch(), patch(function)
        launch._changes = scope._changes
        done.add(modules)
        return launch

    return patch_once
