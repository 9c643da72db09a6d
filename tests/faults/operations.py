"""One operation of a user, chosen by chance: the command, and the states that it may leave its jail in."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from tests.faults.truth import Key, Reported

MOST_JAILS = 7
MOST_TENANTS = 3
RUNS, STOPPED, FROZEN, ABSENT = "Running", "Stopped", "Frozen", "Absent"


class Operation(NamedTuple):
    """A command. `about`: the jail that it may change; `to`: the jail's other name after a rename.

    `leaves`: the states that the jail may be in after the command succeeded; `amid`: after it failed or was cut off.
    """

    argv: tuple[str, ...]
    about: Key | None = None
    to: Key | None = None
    leaves: frozenset[str] = frozenset()
    amid: frozenset[str] = frozenset()
    stdin: bytes | None = None
    writes: str | None = None
    """What it puts into the jail's marker."""


def choose(chance: random.Random, said: Reported, tenants: set[str], number: int) -> Operation:
    """The operation of that number: one that makes sense for what is reported now."""
    jails = sorted(said.jails)
    kinds: list[Callable[[], Operation]] = []
    if len(jails) < MOST_JAILS:
        kinds += [lambda: _new("create", chance, tenants, number)] * 2
        kinds += [lambda: _new("launch", chance, tenants, number)] * 4
    if len(tenants) < MOST_TENANTS:
        kinds += [lambda: Operation(("tenant", "create", f"t{number}", "--jails", "9"))]
    kinds += [lambda: Operation(("list", "--all-tenants")), lambda: _tenant(chance, said, tenants)]
    if jails:
        kinds += [lambda: _on(chance.choice(jails), chance, said, number)] * 14
    return chance.choice(kinds)()


def _states(*names: str) -> frozenset[str]:
    return frozenset(names)


def _new(verb: str, chance: random.Random, tenants: set[str], number: int) -> Operation:
    key = (chance.choice(sorted(tenants)), f"j{number}")
    after = STOPPED if verb == "create" else RUNS
    options = ("-c", "user.number=" + str(number)) if chance.random() < 0.5 else ("--memory", "48MiB")
    return Operation(
        (verb, "busybox", "/".join(key), *options), key, None, _states(after), _states(ABSENT, STOPPED, after)
    )


def _tenant(chance: random.Random, said: Reported, tenants: set[str]) -> Operation:
    name = chance.choice(sorted(tenants))
    if name != "default" and not any(key[0] == name for key in said.jails):
        return Operation(("tenant", "delete", name))
    return Operation(("tenant", "set", name, f"limits.processes={chance.randrange(900, 999)}"))


def _on(key: Key, chance: random.Random, said: Reported, number: int) -> Operation:
    name, state = "/".join(key), said.status(key)
    here, ports = _states(state), sorted(port for port in said.ports if port[:2] == key)
    any_state: list[Operation] = [
        *[Operation(("delete", "--force", name), key, None, _states(ABSENT), _states(state, STOPPED, ABSENT))] * 2,
        Operation(("set", name, f"limits.memory={chance.randrange(40, 80)}MiB"), key, None, here, here),
        Operation(("set", name, f"user.number={number}"), key, None, here, here),
        Operation(("port", "publish", name, f"{20000 + number}:80"), key, None, here, here),
        Operation(("info", name), key, None, here, here),
    ]
    if ports:
        unpublish = ("port", "unpublish", name, str(ports[0][2]))
        any_state += [Operation(unpublish, key, None, here, here)] * 2
    if state != FROZEN:
        marker = f"marker of operation {number}\n"
        put = ("cp", "-", f"{name}:/root/marker")
        any_state += [
            Operation(put, key, None, here, here, marker.encode(), marker),
            Operation(("cp", f"{name}:/etc/passwd", "-"), key, None, here, here),
        ]
    off = _states(state, STOPPED)
    if state == RUNS:
        return chance.choice([
            *any_state,
            *[Operation(("stop", "--force", name), key, None, _states(STOPPED), off)] * 3,
            *[Operation(("restart", "--force", name), key, None, here, off)] * 3,
            *[Operation(("exec", name, "--", "true"), key, None, here, here)] * 3,
            *[Operation(("pause", name), key, None, _states(FROZEN), _states(RUNS, FROZEN))] * 2,
        ])  # fmt: skip
    if state == FROZEN:
        resume = Operation(("resume", name), key, None, _states(RUNS), _states(RUNS, FROZEN))
        return chance.choice([*any_state[:5], *[resume] * 6])
    to = (key[0], f"j{number}")
    return chance.choice([
        *any_state,
        *[Operation(("start", name), key, None, _states(RUNS), _states(STOPPED, RUNS))] * 7,
        *[Operation(("rename", name, to[1]), key, to, here, here)] * 3,
    ])  # fmt: skip
