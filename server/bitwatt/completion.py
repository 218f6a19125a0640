"""Scripts by which shells complete a command line of `bitwatt`."""

from argparse import Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from typing import Literal

__all__ = ["Shell", "completion_script"]

Shell = Literal["bash", "zsh"]


def completion_script(parser: ArgumentParser, shell: Shell) -> str:
    """Return the script for the shell, which completes commands, flags, choices and paths.

    parser  of all commands; it parses nothing afterwards: its flags get the choices that their
            help shows, which the settings judge more kindly

    Raises  ImportError without shtab
    """
    import shtab

    for action in _actions(parser):
        shown = action.metavar or action.dest.rpartition(".")[2].upper()
        if isinstance(shown, str) and shown.startswith("{"):
            # Shells split words at a colon, and cuda:N is typed by nobody.
            action.choices = [one for one in shown.strip("{}").split(",") if ":" not in one]
        elif shown in ("PATH", "FILE", "DESTINATION"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
