"""Completions for bash, zsh and fish: packaging/completions/, with a table made of the commands.

Nothing of jailmgr runs when a key is pressed but `jailmgr list`, where the name of a jail is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from debbuild.commands import Argument, Command, Option, walk

TREE = Path(__file__).resolve().parent.parent
SHELLS = ("bash", "zsh", "fish")
FILES, DIRECTORIES = ("SRC", "DST"), ("FOLDER", "DIR")
MANY = 99


def completion(shell: str, root: Command) -> str:
    """The text of the shell's completion file."""
    from jailmgr.cli.command import FORMATS
    from jailmgr.keys import CONFIG

    table = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    valued = sorted({name for command in walk(root) for option in command.options for name in _valued(option)})
    filled = {
        "@TABLE@": "\n".join(table(root)),
        "@TEMPLATES@": " ".join(sorted(path.name for path in (TREE / "templates").iterdir())),
        "@KEYS@": " ".join(CONFIG),
        "@FORMATS@": " ".join(FORMATS),
        "@VALUED@": " ".join(valued),
    }
    text = (TREE / "packaging" / "completions" / f"jailmgr.{shell}").read_text()
    for mark, what in filled.items():
        text = text.replace(mark, what)
    return text


def _kind(argument: Argument) -> str:
    """What an argument is completed by; empty where nobody can tell."""
    if "NAME or TENANT/NAME" in argument.help:
        return "jails"
    kinds = {"SOURCE": "templates", "TEMPLATE": "templates", "KEY": "keys", "KEY=VALUE": "keys="}
    kinds |= dict.fromkeys(FILES, "paths") | dict.fromkeys(DIRECTORIES, "directories")
    return kinds.get(argument.metavar, "")


def _valued(option: Option) -> tuple[str, ...]:
    return option.names if option.metavar else ()


def _bash(root: Command) -> Iterator[str]:
    yield from ("_jailmgr_table() {", "    commands=() options=() valued=() places=()", "    case $1 in")
    for command in walk(root):
        yield f"        '{' '.join(command.words)}')"
        places = [_kind(argument) or "none" for argument in command.arguments]
        if command.arguments and not command.arguments[-1].many:
            places.append("none")
        lists = {
            "commands": [below.words[-1] for below in command.commands],
            "options": [name for option in command.options for name in option.names],
            "valued": [name for option in command.options for name in _valued(option)],
            "places": places,
        }
        yield from (f"            {name}=({' '.join(words)})" for name, words in lists.items() if words)
        yield "            ;;"
    yield from ("    esac", "}")


def _zsh(root: Command) -> Iterator[str]:
    for command in walk(root):
        yield f"_{'_'.join(('jailmgr', *command.words))}() {{"
        if command.commands:
            yield "    local curcontext=$curcontext state"
            yield "    local -a commands=("
            yield from (f"        '{below.words[-1]}:{_zsh_text(below.short)}'" for below in command.commands)
            yield "    )"
        yield "    _arguments -s -S \\"
        for option in command.options:
            yield f"        {_zsh_option(option)} \\"
        if command.commands:
            yield "        '1: :{_describe command commands}' \\"
            yield "        '*:: :->next'"
            yield f"    [[ $state == next ]] && _call_function - {'_'.join(('_jailmgr', *command.words))}_$words[1]"
        else:
            yield from (f"        {_zsh_argument(number, one)} \\" for number, one in enumerate(command.arguments, 1))
            yield "        && return"
        yield "}"


def _zsh_option(option: Option) -> str:
    value = ""
    if option.metavar:
        actions = {"DIR": "_jailmgr_directories", "KEY=VALUE": "_jailmgr_pairs"}
        action = actions.get(option.metavar, f"({option.metavar.replace('|', ' ')})" if "|" in option.metavar else "")
        value = f":{_zsh_text(option.metavar)}:{action}"
    told = f"[{_zsh_text(option.help)}]{value}"
    long = {name: f"{name}=" if option.metavar and name.startswith("--") else name for name in option.names}
    if len(option.names) == 1:
        return f"'*{long[option.names[0]]}{told}'"
    return f"'*'{{{','.join(long.values())}}}'{told}'"


def _zsh_argument(number: int, argument: Argument) -> str:
    actions = {"keys=": "_jailmgr_pairs", "": " "}
    kind = _kind(argument)
    place = "*" if argument.many else str(number)
    return f"'{place}:{_zsh_text(argument.metavar)}:{actions.get(kind, f'_jailmgr_{kind}')}'"


def _zsh_text(text: str) -> str:
    """For a part of a specification of _arguments, inside of single quotes."""
    for special in "\\[]:":
        text = text.replace(special, f"\\{special}")
    return text.replace("'", "'\\''")


def _fish(root: Command) -> Iterator[str]:
    for command in walk(root):
        words = " ".join(command.words)
        inside = f"__jailmgr_in {words}" if words else ""
        for below in command.commands:
            yield _fish_line(f"__jailmgr_at {words}".rstrip(), f"-a {below.words[-1]}", below.short)
        for option in command.options:
            if not option.hidden:
                yield _fish_line(inside, _fish_option(option), option.help)
        for number, argument in enumerate(command.arguments):
            action = _fish_action(_kind(argument))
            last = MANY if argument.many else number
            if action:
                yield _fish_line(f"__jailmgr_place {number} {last} {words}", action, "")


def _fish_line(condition: str, what: str, told: str) -> str:
    line = f"complete -c jailmgr{f' -n {_fish_text(condition)}' if condition else ''} {what}"
    return f"{line} -d {_fish_text(told)}" if told else line


def _fish_option(option: Option) -> str:
    words = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    if "|" in option.metavar:
        words.append(f"-x -a {_fish_text(option.metavar.replace('|', ' '))}")
    elif option.metavar == "KEY=VALUE":
        words.append("-x -a '(__jailmgr_keys =)'")
    elif option.metavar:
        words.append("-r -F" if option.metavar in DIRECTORIES else "-x")
    return " ".join(words)


def _fish_action(kind: str) -> str:
    names = {"jails": "jails", "templates": "templates", "keys": "keys", "keys=": "keys ="}
    if kind in names:
        return f"-a '(__jailmgr_{names[kind]})'"
    return {"paths": "-F -a '(__jailmgr_jails):'", "directories": "-F"}.get(kind, "")


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
