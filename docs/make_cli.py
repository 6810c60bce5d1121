"""Write `docs/cli.md` from the commands' own help: `python docs/make_cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptavg.cli import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD = """# Command reference

`python docs/make_cli.py` makes this page from `ckptavg --help`.

Results go to stdout, messages and progress to stderr. `--json` prints one JSON document on stdout
and nothing else there.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a problem with the data, the model or the system: an error says what and where |
| 2 | wrong usage |
| 129, 130, 143 | ended by SIGHUP, SIGINT, SIGTERM |

## Configuration

`[tool.ckptavg]` in the `pyproject.toml` of the working directory, or in the file that `--config`
names, supplies defaults. Keys are the long options without their dashes. A key in `[tool.ckptavg]`
is for every command that has such an option, and one in `[tool.ckptavg.COMMAND]` for that command.

```toml
[tool.ckptavg]
model = "train.py:make_model"
loader = "train.py:train_loader"

[tool.ckptavg.average]
expect = 5
```

`bn-refresh` and `landscape` use `model` and `loader` of the common table. `evaluate`, `soup` and
`sweep` use its model only, since its loader returns training data. `average` refreshes only if its
own table or the command line has both.

An option on the command line that has no effect with the others is wrong usage, and the message
names both options. A default that has no effect is ignored.

## Completion in the shell

```sh
eval "$(_CKPTAVG_COMPLETE=bash_source ckptavg)"    # in ~/.bashrc; bash 4.4 or later
eval "$(_CKPTAVG_COMPLETE=zsh_source ckptavg)"     # in ~/.zshrc, after compinit
_CKPTAVG_COMPLETE=fish_source ckptavg | source     # in ~/.config/fish/config.fish
```
"""


def every_command() -> Iterator[tuple[str, click.Command]]:
    """Commands by name, those within a group behind it."""
    for name, command in cli.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            for inner, one in command.commands.items():
                yield f"{name} {inner}", one


def reference() -> str:
    """The whole page."""
    sections = [_HEAD]
    for name, command in every_command():
        context = click.Context(
            command,
            info_name=f"ckptavg {name}",
            max_content_width=100,
            terminal_width=100,
            help_option_names=["-h", "--help"],
        )
        sections.append(f"## ckptavg {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(reference(), encoding="utf-8")
