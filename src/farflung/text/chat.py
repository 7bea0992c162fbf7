"""Chat templates: messages to the text a model was trained on.

A template is Jinja source that came with a model, hence code by strangers: it runs in Jinja's immutable sandbox, with the names
that ``transformers`` gives its templates (``raise_exception``, ``strftime_now``, ``tojson``) and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from farflung.core.errors import UnsupportedModel, UsageError

Message = Mapping[str, Any]
"""``role`` and ``content``, and whatever else the template reads."""

_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,  # {{ 1 / 0 }}
    RuntimeError,  # a macro that calls itself, and what Jinja's own helpers raise
    MemoryError,  # {{ "x" * 10**15 }}
)
"""What a template can raise while it renders, on purpose or because it is hostile."""

_MAX_INDENT = 16


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja source.
        special_tokens: ``bos_token`` and the like, visible to the template.
        clock: seconds since 1970, for templates that write today's date.

    Raises UnsupportedModel where the source is no Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], clock: Callable[[], float]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_refuse,
            strftime_now=lambda form: datetime.fromtimestamp(clock(), tz=UTC).astimezone().strftime(form),
            dict=_new_dict,
            namespace=_GuardedNamespace,
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UnsupportedModel(f"the model's chat template is no valid Jinja: {error}") from error
        except (RecursionError, MemoryError, SyntaxError) as error:  # nested too deep for Jinja, or for Python's compiler
            raise UnsupportedModel(f"the model's chat template cannot be compiled: {error or type(error).__name__}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to where the assistant's answer begins. Raises UsageError where the template refuses the messages."""
        plain = [dict(message) for message in messages]
        try:
            return self._template.render(
                messages=plain, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except _TEMPLATE_FAULTS as error:
            raise UsageError(
                f"the model's chat template refuses these {len(plain)} messages: {error or type(error).__name__}",
                hint="most take an optional system message, then user and assistant in turn, each with role and content",
            ) from error


class _GenerationBlock(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _GuardedNamespace(Namespace):
    """No names with a leading underscore, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # not named in the signature: a template may say namespace(self=...)
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a chat template may not set {name!r}")
        super().__setitem__(name, value)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it: without the HTML escapes of Jinja's own filter."""
    if indent is not None and not 0 <= indent <= _MAX_INDENT:
        raise jinja2.TemplateError(f"tojson(indent={str(indent)[:20]}) is out of range: 0 to {_MAX_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
