"""Texts and values of a document, by Jinja's templates and expressions in a sandbox: they compute, and call no code.

A template has expressions in `{{ }}` alone: statements, which could loop for ever, are letters like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from conf.errors import UserError

Document = Mapping[str, Any]
NEVER = "\0\0"  # no template holds it


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses the operators by which a short expression makes a value that fills the memory."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(x, int | float) and abs(x) < 2**31 for x in (left, right)) or operator == "**":
            raise SecurityError(f"{operator} of {type(left).__name__} and {type(right).__name__}")
        return super().call_binop(context, operator, left, right)


_SANDBOX = _Sandbox(
    autoescape=False,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    block_start_string=NEVER + "a",
    block_end_string=NEVER + "b",
    comment_start_string=NEVER + "c",
    comment_end_string=NEVER + "d",
)


def template(name: str, source: str) -> Callable[[Document], str]:
    """The function that makes the text of a document.

    Raises:
        UserError: no template; the function too, for a document that lacks a field; `name` says which template.
    """
    if NEVER in source:
        raise UserError(f"{name}: a template holds no zero bytes: leave them out")
    made = _compiled(name, source, lambda: _SANDBOX.from_string(source).render)
    return lambda document: _applied(name, source, lambda: str(made(dict(document))))


def expression(name: str, source: str) -> Callable[[Document], Any]:
    """The function that computes a value of a document. Raises as `template`."""
    made = _compiled(name, source, lambda: _SANDBOX.compile_expression(source, undefined_to_none=False))

    def compute(document: Document) -> Any:
        value = made(dict(document))
        if isinstance(value, StrictUndefined):
            str(value)  # raises its own error
        return value

    return lambda document: _applied(name, source, lambda: compute(document))


def _compiled(name: str, source: str, compiled: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    try:
        return compiled()
    except TemplateError as e:
        raise UserError(f"{name}: {source!r} is no template ({e}): correct it") from None


def _applied(name: str, source: str, applied: Callable[[], Any]) -> Any:
    try:
        return applied()
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        raise UserError(f"{name}: {source!r} fails ({e})") from None
