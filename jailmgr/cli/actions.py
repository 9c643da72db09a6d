"""What the hot commands do, told by Typer and by the small reader alike, and their like for other states.

On the hot way: standard library only, and little of it.
"""

from __future__ import annotations

from jailmgr.cli.settings import Settings, name_of, split_name, wrong_usage
from jailmgr.errors import JailmgrError, full_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ELIGIBLE = {
    "start": ("Stopped", "Error"),
    "stop": ("Running", "Frozen", "Error"),
    "restart": ("Running", "Frozen"),
    "freeze": ("Running",),
    "unfreeze": ("Frozen",),
    "delete": (),
}
"""Statuses of the jails that --all means, by action; every one where none is named."""

WORD = {"freeze": "pause", "unfreeze": "resume"}
"""Actions of the API whose command has another name."""


_IDLE = dict.fromkeys(("stop", "restart"), "waiting for init to end (--force kills it)")
"""What is shown while these take long."""


class Failures(JailmgrError):
    """Some of several failed: each error is told, the exit status is 1."""

    def __init__(self, errors: list[JailmgrError], of: int, noun: str = "jails") -> None:
        first = errors[0]
        super().__init__(f"{len(errors)} of {of} {noun}", f"{first.what}: {first.why}", first.hint, first.code)
        self.errors = errors


def exec_(
    settings: Settings,
    name: str,
    command: list[str],
    tty: bool | None = None,
    user: str | None = None,
    workdir: str | None = None,
    environment: list[str] | None = None,
) -> int:
    """Run a command in a jail and return its exit status (125 to 127 as cli.md says, 128+N for signal N).

    Straight to the tenant's supervisor: neither the engine nor the store takes part. With `tty` None a terminal is
    made where stdin and stdout are terminals.
    """
    return enter(settings, name, command, user=user, cwd=workdir, env=_variables(environment or []), tty=tty)


def enter(settings: Settings, name: str, command: list[str], **how: Any) -> int:
    """Run a command in a jail, or a login shell; `how` is relay.exec_'s."""
    from jailmgr.runtime import relay

    tenant, jail = split_name(settings, name)
    try:
        return relay.exec_(settings.root, tenant, jail, command, **how)
    except JailmgrError:
        check_known(settings, tenant, jail)
        raise


def check_known(settings: Settings, tenant: str, jail: str) -> None:
    """JailmgrError (missing) where there is no such jail. Told by its directory: neither engine nor store is asked.

    Who isn't root hears it from the engine.
    """
    import os

    if os.geteuid() == 0 and not os.path.isdir(settings.root.jail_lib(tenant, jail)):
        raise JailmgrError(
            f"jail {full_name(tenant, jail)}",
            "there is none of that name",
            "See jailmgr list --all-tenants.",
            "missing",
        )


def _variables(given: list[str]) -> dict[str, str]:
    """Variables of `-e K=V`."""
    variables = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise wrong_usage(f"-e {text}", "not a variable", "Write -e NAME=VALUE.")
        variables[key] = value
    return variables


def start(settings: Settings, names: list[str] | None = None, all_: bool = False, wait: bool = False) -> int:
    """Start jails; with `wait`, return when the init of each reports that the system is up."""
    return change(settings, "start", names, all_, {"wait": wait})


def stop(
    settings: Settings,
    names: list[str] | None = None,
    all_: bool = False,
    force: bool = False,
    timeout: int | None = None,
) -> int:
    """Stop jails: init is asked to, and killed where it takes longer than the timeout (s) or `force` is given."""
    body: dict[str, Any] = {"force": force} if timeout is None else {"force": force, "timeout": timeout}
    return change(settings, "stop", names, all_, body)


def list_(settings: Settings, all_tenants: bool = False) -> int:
    """The tenant's jails, or everybody's, with limits beside usage."""
    from jailmgr.cli.client import existing_engine
    from jailmgr.cli.layout import jail_table
    from jailmgr.cli.output import show

    whose = "all-projects=true" if all_tenants else f"project={settings.tenant}"
    views = existing_engine(settings.root).call("GET", f"/1.0/instances?recursion=2&{whose}")
    show(settings, views, lambda: jail_table(views, all_tenants))
    return 0


def change(settings: Settings, action: str, names: list[str] | None, all_: bool, body: dict[str, Any]) -> int:
    """Ask for a change of several jails at once, then wait for each. Raises Failures where any failed."""
    from jailmgr.cli.client import existing_engine

    check_targets(WORD.get(action, action), names, all_)
    named = list(dict.fromkeys(split_name(settings, name) for name in names or []))
    connection = existing_engine(settings.root)
    targets = named or find_eligible(settings, connection, action)

    def begin(tenant: str, name: str) -> Any:
        if action == "delete":
            force = "&force=1" if body.get("force") else ""
            return connection.call("DELETE", f"/1.0/instances/{name}?project={tenant}{force}")
        return connection.call("PUT", f"/1.0/instances/{name}/state?project={tenant}", {"action": action, **body})

    return finish(settings, connection, WORD.get(action, action), targets, begin)


def check_targets(word: str, names: list[str] | None, all_: bool) -> None:
    """Refuse a command that names no jail, or names some beside --all."""
    if all_ and names:
        raise wrong_usage(f"jailmgr {word}", "--all and names exclude each other", "Leave out one of them.")
    if not all_ and not names:
        raise wrong_usage(f"jailmgr {word}", "no jail was named", f"Give a name, several, or --all: jailmgr {word} web")


def find_eligible(settings: Settings, connection: Any, action: str) -> list[tuple[str, str]]:
    """Tenant and name of each jail that --all means: those of the tenant that the action fits."""
    views = connection.call("GET", f"/1.0/instances?recursion=2&project={settings.tenant}")
    eligible = ELIGIBLE[action]
    return [(view["tenant"], view["name"]) for view in views if not eligible or view["status"] in eligible]


def finish(settings: Settings, connection: Any, word: str, targets: list[tuple[str, str]], begin: Any) -> int:
    """Begin the operation of each target, so that they run side by side, and wait for them all."""
    from jailmgr.cli.operations import result, wait
    from jailmgr.cli.output import remark, show

    begun, done, errors = [], [], []
    for tenant, name in targets:
        try:
            begun.append((tenant, name, begin(tenant, name)))
        except JailmgrError as error:
            errors.append(error)
    for tenant, name, operation in begun:
        try:
            ended = result(
                wait(settings, connection, operation, f"{word} {name_of(tenant, name)}", _IDLE.get(word, ""))
            )
            row = {"name": name, "tenant": tenant, "action": word}
            if (seconds := ended.get("killed_after")) is not None:
                remark(settings, f"{word} {name_of(tenant, name)}: killed after {seconds} s, for init had not ended")
                row["killed_after"] = seconds
            done.append(row)
        except JailmgrError as error:
            errors.append(error)
    if errors and len(targets) == 1:
        raise errors[0]
    if not errors or done:
        show(settings, done, lambda: "")
    if errors:
        raise Failures(errors, len(targets))
    return 0
