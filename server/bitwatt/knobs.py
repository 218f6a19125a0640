"""What a person is told of a setting: in `--help`, and in docs/settings.md."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from textwrap import wrap
from types import NoneType
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import annotated_types as limits
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from bitwatt.mistakes import about_flag
from bitwatt.quantities import written_bytes

__all__ = ["Knob", "Settings", "Shown", "knobs_of", "new_cli_source"]

S = TypeVar("S", bound=BaseSettings)

[_POSITIONAL] = get_args(CliPositionalArg[str])[1:]


class Settings(BaseSettings):
    """A command's settings, each a flag and a variable; an empty variable is as if unset.

    groups       titles of the flags, by the name of the first setting under each
    never_empty  settings whose empty variable is taken as it is, to be refused
    """

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
    )
    groups: ClassVar[dict[str, str]] = {}
    never_empty: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[Any, ...]:
        """Read no variable for an alias, which has no prefix: JSON= is anybody's.

        Where no variable is a setting's, the fields' types aren't looked at: that takes 5 ms.
        """
        aliases = {field.alias for field in settings_cls.model_fields.values() if field.alias}
        variables = {cls.variable(name) for name in settings_cls.model_fields}

        def environment() -> dict[str, Any]:
            if variables.isdisjoint(map(str.upper, os.environ)):
                return {}
            given = {name: v for name, v in env_settings().items() if name not in aliases}
            empty = {name.upper() for name, value in os.environ.items() if not value}
            given |= {name: "" for name in cls.never_empty if cls.variable(name) in empty}
            return given

        return init_settings, environment

    @classmethod
    def variable(cls, name: str) -> str:
        """Return the name of the variable that sets this."""
        return f"{cls.model_config.get('env_prefix', '')}{name}".upper()


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
    group    the title it stands under, "" for none
    """

    name: str
    flag: str
    value: str
    meaning: str
    limits: str
    default: str
    group: str = ""

    @property
    def help(self) -> str:
        """The meaning, the limits and the default, as one text."""
        default = f"default: {self.default}" if self.default else "required"
        return f"{self.meaning} ({'; '.join(part for part in (self.limits, default) if part)})"


def knobs_of(settings: type[BaseSettings]) -> list[Knob]:
    """Return the settings in the order of their fields; subcommands are none."""
    groups = settings.groups if issubclass(settings, Settings) else {}
    knobs, group = [], ""
    for name, field in settings.model_fields.items():
        group = groups.get(name, group)
        if not _is_command(field):
            knobs.append(_knob(name, field, group))
    return knobs


def _is_command(field: FieldInfo) -> bool:
    return any(
        isinstance(part, type) and issubclass(part, BaseSettings)
        for part in _types(field.annotation)
    )


def _knob(name: str, field: FieldInfo, group: str) -> Knob:
    shown = next((m for m in field.metadata if isinstance(m, Shown)), Shown(""))
    is_positional = _POSITIONAL in field.metadata
    written = (field.alias or name).replace("_", "-")
    is_switch = bool in _types(field.annotation)
    is_bytes = shown.value == "BYTES"
    return Knob(
        name=name,
        flag=written.upper() if is_positional else f"--{written}",
        value="" if is_switch or is_positional else shown.value or _choices(field.annotation),
        meaning=field.description or "",
        limits=_limits(field, is_bytes=is_bytes),
        default=""
        if field.is_required()
        else shown.default or _default(field.default, is_bytes=is_bytes),
        group=group,
    )


def _types(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type, None left out."""
    if get_origin(annotation) in (None, Literal, tuple):
        return (annotation,)
    return tuple(part for part in get_args(annotation) if part is not NoneType)


def _choices(annotation: Any) -> str:
    [type_] = _types(annotation)
    return f"{{{','.join(map(str, get_args(type_)))}}}" if get_origin(type_) is Literal else ""


def _limits(field: FieldInfo, *, is_bytes: bool) -> str:
    low = high = ""
    for limit in field.metadata:
        match limit:
            case limits.Ge(value):
                low = f"at least {_plain(value, is_bytes=is_bytes)}"
            case limits.Gt(value):
                low = f"above {_plain(value)}"
            case limits.Le(value):
                high = f"at most {_plain(value, is_bytes=is_bytes)}"
            case limits.MaxLen(value):
                high = f"at most {value} characters"
    if low.startswith("at least") and high:
        return f"{low.removeprefix('at least ')} to {high.removeprefix('at most ')}"
    return ", ".join(part for part in (low, high) if part)


def _plain(value: Any, *, is_bytes: bool = False) -> str:
    if is_bytes and value >= 1024:
        return written_bytes(value)
    return str(int(value) if value == int(value) else value)


def _default(value: object, *, is_bytes: bool = False) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return _plain(value, is_bytes=is_bytes)
    return "none" if value is None or value == () else str(value)


def new_cli_source(settings: type[S], commands: Mapping[str, type[BaseSettings]]) -> Any:
    """Return the source that reads the command line, its help told by the knobs.

    commands  the settings of each subcommand, by name
    """
    knobs = {"": knobs_of(settings)} | {name: knobs_of(s) for name, s in commands.items()}
    told = {
        f"{command}.{_dest(knob)}".lstrip("."): knob
        for command, its in knobs.items()
        for knob in its
    }
    groups: dict[tuple[int, str], Any] = {}
    known = {command: ["--help"] for command in knobs}

    def add_argument(parser: ArgumentParser, *names: str, **options: Any) -> Any:
        knob = told.get(options.get("dest", names[0]))
        into: Any = parser
        if knob is not None:
            options["help"] = knob.help.replace("%", "%%")
            if knob.value:
                options["metavar"] = knob.value
            if options.get("action") == "store_false":  # both ways to write it
                names, options = (knob.flag,), options | {"action": BooleanOptionalAction}
            if knob.group and names[0].startswith("-"):
                key = (id(parser), knob.group)
                into = groups.get(key) or parser.add_argument_group(knob.group)
                groups[key] = into
        action = into.add_argument(*names, **options)
        known[options.get("dest", names[0]).rpartition(".")[0]] += action.option_strings
        return action

    def parse_args(parser: ArgumentParser, args: Sequence[str], namespace: Any = None) -> Any:
        parsed, unknown = parser.parse_known_args(args, namespace)
        if unknown:
            command = next((arg for arg in args if arg in commands), "")
            wrong = next((arg for arg in unknown if arg.startswith("-")), unknown[0])
            parser.error(about_flag(wrong, known[command]), command)  # type: ignore[call-arg]
        return parsed

    prog = settings.model_config.get("cli_prog_name")
    return CliSettingsSource(
        settings,
        root_parser=_Parser(
            prog=prog,
            description=settings.__doc__,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        ),
        parse_args_method=parse_args,
        add_argument_method=add_argument,
        formatter_class=_HelpFormatter,
    )


class _Parser(ArgumentParser):
    """Says what is wrong in a line, without every flag there is before it."""

    def error(self, message: str, command: str = "") -> NoReturn:
        prog = f"{self.prog} {command}".strip()
        self.exit(2, f"{prog}: {message} ({prog} --help)\n")


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Breaks no --flag-name, and takes a docstring's indentation off."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(cleandoc(text), width, indent)


def _dest(knob: Knob) -> str:
    """Return the name under which pydantic-settings declares it to argparse."""
    return knob.flag.removeprefix("--").replace("-", "_").lower()
