"""A command as it was typed, for reports: the options that were given and no defaults."""

import shlex
from collections.abc import Iterator
from typing import Any

import typer

UNSAID = frozenset({"quiet", "verbose", "resume"})
"""Options that change nothing of what comes out."""


def command_line(context: typer.Context, name: str) -> str:
    """``tfmq-NAME`` with its arguments, ready for a shell."""
    words = [f"tfmq-{name}"]
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name))
        if given is not None and given.name == "COMMANDLINE" and parameter.name not in UNSAID:
            words += _words(parameter, context.params[str(parameter.name)])
    return shlex.join(words)


def _words(parameter: Any, value: object) -> Iterator[str]:  # a parameter of click, which typer brings along
    if parameter.param_type_name == "argument":
        yield str(value)
    elif value is False:
        yield parameter.secondary_opts[0]
    elif value is True:
        yield parameter.opts[0]
    else:
        for each in value if isinstance(value, list | tuple) else (value,):
            yield from (parameter.opts[0], str(each))
