"""Manual pages (man(7)) of the commands: jailmgr(1), and jailmgr-NAME(1) for each command and each noun."""

from __future__ import annotations

import time
from collections.abc import Iterator

from debbuild.commands import HELP, Command, Option

ENVIRONMENT = {
    "JAILMGR_ROOT": "Where an instance of its own keeps all it has: state, sockets and configuration.",
    "JAILMGR_TENANT": "The tenant meant where --tenant is not given.",
}
FILES = {
    "/etc/jailmgr/templates": "The admin's own templates, before those that came with jailmgr.",
    "/var/lib/jailmgr": "The store, the pool with images and volumes, each jail's console log.",
    "/run/jailmgr": "Sockets, and the state of what runs.",
}
STATUS = {"0": "Done.", "1": "Failed.", "2": "Wrong usage."}


def pages(root: Command, version: str, epoch: int) -> dict[str, str]:
    """File name to text. `epoch`: seconds since 1970, the date in the pages' footer."""
    told = {}
    for command in (root, *root.commands):
        name = "-".join(("jailmgr", *command.words))
        date = time.strftime("%Y-%m-%d", time.gmtime(epoch))
        head = f'.TH {_text(name).upper()} 1 {date} "jailmgr {_text(version)}" "jailmgr manual"'
        told[f"{name}.1"] = "\n".join((head, *_page(command, name, root))) + "\n"
    return told


def _page(command: Command, name: str, root: Command) -> Iterator[str]:
    short = command.short.rstrip(".")
    yield from (".SH NAME", rf"{_text(name)} \- {_text(short[0].lower() + short[1:])}", ".SH SYNOPSIS")
    for one in command.commands if command.words and command.commands else (command,):
        yield from (_synopsis(one), ".br")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(command.help)
    if command is root:
        yield ".SH COMMANDS"
        for one in root.commands:
            yield from (".TP", rf"\fBjailmgr\-{_text(one.words[0])}\fR(1)", _text(one.short))
    elif command.commands:
        yield ".SH COMMANDS"
        for one in command.commands:
            yield from (".SS " + _text(" ".join(("jailmgr", *one.words))), *_paragraphs(one.help))
            yield from (*_parameters(one), *_example(one))
    else:
        yield from (".SH OPTIONS", *_parameters(command))
    if command is root:
        yield from (".SH OPTIONS", "They are taken before the command and after it alike.", *_parameters(root))
        yield from (*_list("ENVIRONMENT", ENVIRONMENT), *_list("FILES", FILES))
    else:
        yield ".PP"
        yield r"The global options (\-\-tenant, \-\-format, \-\-root, \-q, \-y, \-\-debug) are in \fBjailmgr\fR(1)."
    if command.words != ("exec",):
        yield from _list("EXIT STATUS", STATUS)
    if not command.commands:
        yield from (".SH EXAMPLE", *_example(command))
    others = [one.words[0] for one in root.commands if one is not command] if command is root else []
    yield ".SH SEE ALSO"
    yield ",\n".join(rf"\fBjailmgr\-{_text(other)}\fR(1)" for other in others) or r"\fBjailmgr\fR(1)"


def _synopsis(command: Command) -> str:
    words = [rf"\fB{_text(' '.join(('jailmgr', *command.words)))}\fR", r"[\fIOPTION\fR]..."]
    for argument in command.arguments:
        text = rf"\fI{_text(argument.metavar)}\fR" + ("..." if argument.many else "")
        words.append(text if argument.required else f"[{text}]")
    if command.commands:
        words += [r"\fICOMMAND\fR", r"[\fIARGUMENT\fR]..."]
    return " ".join(words)


def _parameters(command: Command) -> Iterator[str]:
    for argument in command.arguments:
        yield from (".TP", rf"\fI{_text(argument.metavar)}\fR", _text(argument.help))
    for option in command.options:
        if not (option.hidden or (option is HELP and len(command.words) > 1)):
            yield from (".TP", _names(option), _text(option.help))
    yield ".PP"


def _names(option: Option) -> str:
    names = ", ".join(rf"\fB{_text(name)}\fR" for name in option.names)
    return names + (rf" \fI{_text(option.metavar)}\fR" if option.metavar else "")


def _example(command: Command) -> Iterator[str]:
    if command.example:
        yield from (".PP", ".EX", _text(command.example), ".EE", ".PP")


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from (".PP", _text(" ".join(paragraph.split())))


def _list(title: str, entries: dict[str, str]) -> Iterator[str]:
    yield f".SH {title}"
    for name, text in entries.items():
        yield from (".TP", rf"\fB{_text(name)}\fR", _text(text))


def _text(text: str) -> str:
    """`text` as groff_char(7) wants it: what is typed stays an ASCII character, and no line is a request."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("`", r"\(ga").replace("^", r"\(ha")
    escaped = escaped.replace("~", r"\(ti").replace("'", r"\(aq")
    return rf"\&{escaped}" if escaped[:1] == "." else escaped
