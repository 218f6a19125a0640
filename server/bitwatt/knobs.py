"""What a person is told of a setting: in `--help`, and in docs/settings.md."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from inspect import cleandoc
from textwrap import wrap
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import annotated_types as limits
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliPositionalArg, CliSettingsSource

__all__ = ["Knob", "Shown", "knobs_of", "new_cli_source"]

S = TypeVar("S", bound=BaseSettings)

[_POSITIONAL] = get_args(CliPositionalArg[str])[1:]


class Shown(NamedTuple):
    """How a setting's value is written, to annotate its type with.

    value    what a person types: SECONDS, KEY[,KEY...]; "" where the choices say it
    default  where the default is none: what happens then
    """

    value: str
    default: str = ""


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting.

    flag     --max-queue, or PATH for one that has no flag
    value    what a person types after it; "" after a switch
    meaning  what it sets, and in which unit
    limits   the values it may have, "" for any
    default  what holds without it, "" where it must be given
    """

    name: str
    flag: str
    value: str
    meaning: str
    limits: str
    default: str

    @property
    def help(self) -> str:
        """The meaning, the limits and the default, as one text."""
        default = f"default: {self.default}" if self.default else "required"
        return f"{self.meaning} ({'; '.join(part for part in (self.limits, default) if part)})"


def knobs_of(settings: type[BaseSettings]) -> list[Knob]:
    """Return the settings in the order of their fields; subcommands are none."""
    return [
        _knob(name, field)
        for name, field in settings.model_fields.items()
        if not _is_command(field)
    ]


def _is_command(field: FieldInfo) -> bool:
    return any(
        isinstance(part, type) and issubclass(part, BaseSettings)
        for part in _types(field.annotation)
    )


def _knob(name: str, field: FieldInfo) -> Knob:
    shown = next((m for m in field.metadata if isinstance(m, Shown)), Shown(""))
    is_positional = _POSITIONAL in field.metadata
    written = (field.alias or name).replace("_", "-")
    is_switch = bool in _types(field.annotation)
    return Knob(
        name=name,
        flag=written.upper() if is_positional else f"--{written}",
        value="" if is_switch or is_positional else shown.value or _choices(field.annotation),
        meaning=field.description or "",
        limits=_limits(field),
        default="" if field.is_required() else shown.default or _default(field.default),
    )


def _types(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type, None left out."""
    if get_origin(annotation) in (None, Literal, tuple):
        return (annotation,)
    return tuple(part for part in get_args(annotation) if part is not NoneType)


def _choices(annotation: Any) -> str:
    [type_] = _types(annotation)
    return f"{{{','.join(map(str, get_args(type_)))}}}" if get_origin(type_) is Literal else ""


def _limits(field: FieldInfo) -> str:
    low = high = ""
    for limit in field.metadata:
        match limit:
            case limits.Ge(value):
                low = f"at least {_plain(value)}"
            case limits.Gt(value):
                low = f"above {_plain(value)}"
            case limits.Le(value):
                high = f"at most {_plain(value)}"
            case limits.MaxLen(value):
                high = f"at most {value} characters"
    if low.startswith("at least") and high:
        return f"{low.removeprefix('at least ')} to {high.removeprefix('at most ')}"
    return ", ".join(part for part in (low, high) if part)


def _plain(value: Any) -> str:
    return str(int(value) if value == int(value) else value)


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return _plain(value)
    return "none" if value is None or value == () else str(value)


def new_cli_source(settings: type[S], commands: dict[str, type[BaseSettings]]) -> Any:
    """Return the source that reads the command line, its help told by the knobs.

    commands  the settings of each subcommand, by name
    """
    told = {_dest(knob): knob for knob in knobs_of(settings)}
    for command, its_settings in commands.items():
        told |= {f"{command}.{_dest(knob)}": knob for knob in knobs_of(its_settings)}

    def add_argument(parser: ArgumentParser, *names: str, **options: Any) -> Any:
        knob = told.get(options.get("dest", names[0]))
        if knob is not None:
            options["help"] = knob.help.replace("%", "%%")
            if knob.value:
                options["metavar"] = knob.value
        return parser.add_argument(*names, **options)

    return CliSettingsSource(
        settings, add_argument_method=add_argument, formatter_class=_HelpFormatter
    )


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Breaks no --flag-name, and takes a docstring's indentation off."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(cleandoc(text), width, indent)


def _dest(knob: Knob) -> str:
    """Return the name under which pydantic-settings declares it to argparse."""
    return knob.flag.removeprefix("--").replace("-", "_").lower()
