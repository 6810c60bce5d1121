"""Commands: their options in groups, those without effect, and the dataclasses that they fill."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from ckptavg.cli.console import Console
from ckptavg.cli.declarations import check_exists
from ckptavg.errors import UserCodeError, described

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


RUNNING = "Running"
"""Title of the group that every command has; it shows `--help` as well."""


class NoEffect(NamedTuple):
    """A combination in which some options have no effect.

    Attributes:
        where: completes `--OPTION has no effect ...`, and names the other option.
        applies: called with the command's parameters: whether they are such a combination.
        options: the names of the options' parameters.
    """

    where: str
    applies: Callable[[Mapping[str, Any]], bool]
    options: Sequence[str]


def without(other: str, *options: str) -> NoEffect:
    """The rule for options that have no effect unless another is given."""
    where = f"without --{other.replace('_', '-')}"
    return NoEffect(where, lambda params: not params.get(other), options)


class Command(click.Command):
    """A command that shows its options in groups and refuses those without effect.

    Its function is called with a `console`, and without the options of that.

    Args:
        groups: the options by the title above them.
        no_effect: the combinations in which an option has no effect.
        params: the arguments.
        settings: what `click.Command` takes.
    """

    def __init__(
        self,
        name: str | None,
        *,
        groups: Mapping[str, Sequence[click.Option]],
        no_effect: Iterable[NoEffect] = (),
        params: Iterable[click.Parameter],
        **settings: Any,  # noqa: ANN401
    ) -> None:
        options = [option for group in groups.values() for option in group]
        super().__init__(name, params=[*params, *options], **settings)
        self._groups, self._no_effect = groups, no_effect

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; the error about an option without its value says what that is."""
        try:
            return super().parse_args(ctx, args)
        except click.BadOptionUsage as error:
            texts = [
                f"{error} {option.make_metavar(ctx)}: {option.help}"
                for option in self.params
                if error.option_name in option.opts
                and isinstance(option, click.Option)
                and not option.is_flag
            ]
            raise click.UsageError("".join(texts) or str(error), ctx) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options into the help, a section for each group."""
        for title, options in self._groups.items():
            shown = [*options, self.get_help_option(ctx) if title == RUNNING else None]
            records = [option.get_help_record(ctx) for option in shown if option is not None]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        """Run the command; an option without effect that the configuration set is dropped.

        Raises:
            click.UsageError: an option on the command line has no effect.
            UserCodeError: the user's code ended the program.
        """
        for where, applies, options in self._no_effect:
            for name in options:
                source = ctx.get_parameter_source(name)
                if source in (None, ParameterSource.DEFAULT) or not applies(ctx.params):
                    continue
                if source is ParameterSource.COMMANDLINE:
                    [spelled] = [param.opts[-1] for param in self.params if param.name == name]
                    raise click.UsageError(f"{spelled} has no effect {where}", ctx)
                ctx.params.pop(name, None)
        for param in self.params:
            if param.name != "directory":  # of the demo, which makes it
                check_exists(param, ctx.params.get(str(param.name)))
        as_json, quiet = ctx.params.pop("json"), ctx.params.pop("quiet")
        ctx.params["console"] = Console(as_json=as_json, quiet=quiet)
        try:
            return super().invoke(ctx)
        except SystemExit as error:  # ours end by returning, or by other exceptions
            raise UserCodeError(f"your code raised {described(error)}") from error


def fields_of(kind: type, params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass that a command's parameters have, by name.

    Args:
        kind: the dataclass.
        params: the command's parameters.
        prefix: the field `loader` is the parameter `PREFIXloader`, if there is one.
    """
    fields = {}
    for field in dataclasses.fields(kind):
        for name in (field.name, prefix + field.name):
            if name in params:
                fields[field.name] = params[name]
    return fields


def names_of(options: Iterable[click.Option]) -> list[str]:
    """The names of the options' parameters."""
    return [str(option.name) for option in options]


def without_blas_threads() -> None:
    """Have numpy start no threads of its BLAS, which takes as long as importing numpy does.

    It is for commands that do not use BLAS, before they import numpy.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
