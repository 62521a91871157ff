"""docs/commands.md says what `--help` says; every command shows an example.

`python tests/test_page_of_commands.py` writes the page anew.
"""

import pathlib
import re

import pytest
import typer

from ndlora_plugins.commands.main import app

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "commands.md"
COMMANDS = typer.main.get_command(app).commands
MORE = (
    "What goes wrong in a training that was begun keeps its traceback; `NDLORA_TRACEBACK=1` shows every one. `--json` "
    "prints what a script reads. `ndlora --install-completion` lets the shell complete commands and options, `ndlora "
    "--version` prints the version."
)
STATUS = "Exit status 0: good; 1: a problem was found, or two adapters differ; 2: it could not be done."


def example(command):
    """The command line of the help's last paragraph."""
    found = re.search(r"Example: (ndlora .*)", command.help)
    return found[1] if found else None


def parameters(command):
    for parameter in command.params:
        name = (
            parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join(parameter.opts)
        )
        default = parameter.default
        shown = default not in (None, False, (), []) and isinstance(default, (str, int, float))
        value = f" (`{default.value if hasattr(default, 'value') else default}`)" if shown else ""
        if name != "--help":
            yield f"| `{name}` | {getattr(parameter, 'help', None) or ''}{value} |"


def commands_page():
    lines = [
        "# Commands",
        "",
        f"Generated from their own `--help` by `python tests/test_page_of_commands.py`. {STATUS} "
        f"Errors are one line on stderr, and an output that exists is never overwritten. {MORE}",
        "",
        "| command | |",
        "|---|---|",
        *(
            f"| [{name}](#ndlora-{name}) | {found.help.partition(chr(10))[0]} |"
            for name, found in COMMANDS.items()
        ),
    ]
    for name, found in COMMANDS.items():
        lines += [
            "",
            f"## `ndlora {name}`",
            "",
            found.help.partition("\n")[0],
            "",
            "```",
            example(found),
            "```",
        ]
        rows = list(parameters(found))
        lines += ["", "| | |", "|---|---|", *rows] if rows else []
    return "\n".join([*lines, ""])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(name):
    assert example(COMMANDS[name]).startswith(f"ndlora {name}")


@pytest.mark.skipif(
    getattr(COMMANDS["plan"].params[0], "help", None) is None,
    reason="this typer loses the help of arguments with this click",
)
def test_the_page_is_what_the_commands_say():
    assert PAGE.read_text() == commands_page()


if __name__ == "__main__":
    PAGE.write_text(commands_page())
