"""launch, create, start, stop, restart, pause, resume, delete, rename, list, info."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jailmgr.cli import actions
from jailmgr.cli.client import ensure_engine, existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.layout import jail_page
from jailmgr.cli.operations import result, wait
from jailmgr.cli.output import agree, show
from jailmgr.cli.request import Wanted, instance_request
from jailmgr.cli.settings import Settings, check_label, name_of, split_name

Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Jails: NAME or TENANT/NAME.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A jail: NAME or TENANT/NAME.")]
All = Annotated[bool, typer.Option("--all", help="Every jail of the tenant that this fits.")]
Wait = Annotated[bool, typer.Option("--wait", help="Return when init reports that the system is up.")]
Force = Annotated[bool, typer.Option("--force", help="Kill init at once instead of asking it to end.")]

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A template (debian, debian/bookworm), an image alias or fingerprint.")
]
NewName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The jail's name; one is made up and printed where it is left out.")
]
Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="limits.memory, such as 512MiB.")]
Cpus = Annotated[str | None, typer.Option("--cpus", metavar="N", help="CPUs' worth of time, such as 2 or 1.5.")]
Disk = Annotated[str | None, typer.Option("--disk", metavar="SIZE", help="Size of the volume, such as 5GiB.")]
Processes = Annotated[int | None, typer.Option("--processes", metavar="N", min=1, help="limits.processes.")]
Network = Annotated[str | None, typer.Option("--network", metavar="NET", help="The tenant's network to join.")]
Address = Annotated[str | None, typer.Option("--ip", metavar="ADDR", help="The jail's IPv4 address.")]
Publish = Annotated[
    list[str] | None,
    typer.Option("-p", metavar="[ADDR:]HOSTPORT:PORT[/udp]", help="Publish a port on the host; may be given again."),
]
Variables = Annotated[
    list[str] | None, typer.Option("-e", metavar="K=V", help="A variable of init's environment; may be given again.")
]
Keys = Annotated[
    list[str] | None, typer.Option("-c", metavar="KEY=VALUE", help="A configuration key; may be given again.")
]


def add(app: typer.Typer) -> None:
    """Add the commands to the app."""
    command(app, example="jailmgr launch debian web --memory 512MiB -p 8080:80 --wait")(launch)
    command(app, example="jailmgr create debian/bookworm web --disk 5GiB")(create)
    command(app, example="jailmgr start web db --wait")(start)
    command(app, example="jailmgr stop web --timeout 10")(stop)
    command(app, example="jailmgr restart web")(restart)
    command(app, example="jailmgr pause web")(pause)
    command(app, example="jailmgr resume web")(resume)
    command(app, example="jailmgr delete web --force")(delete)
    command(app, example="jailmgr rename web www")(rename)
    command(app, "list", example="jailmgr list --format json")(list_)
    command(app, example="jailmgr info web")(info)


def launch(
    settings: Settings,
    source: Source,
    name: NewName = None,
    memory: Memory = None,
    cpus: Cpus = None,
    disk: Disk = None,
    processes: Processes = None,
    network: Network = None,
    ip: Address = None,
    publish: Publish = None,
    environment: Variables = None,
    config: Keys = None,
    wait: Wait = False,
) -> int:
    """Create a jail and start it. A template not yet built is built."""
    wanted = Wanted(memory, cpus, disk, processes, network, ip, publish, environment, config)
    return make(settings, "launch", source, name, wanted, {"start": True, "wait": wait})


def create(
    settings: Settings,
    source: Source,
    name: NewName = None,
    memory: Memory = None,
    cpus: Cpus = None,
    disk: Disk = None,
    processes: Processes = None,
    network: Network = None,
    ip: Address = None,
    publish: Publish = None,
    environment: Variables = None,
    config: Keys = None,
    wait: Wait = False,
) -> int:
    """Create a jail without starting it. A template not yet built is built; --wait is for launch."""
    wanted = Wanted(memory, cpus, disk, processes, network, ip, publish, environment, config)
    return make(settings, "create", source, name, wanted, {"start": False, "wait": False})


def make(settings: Settings, word: str, source: str, name: str | None, wanted: Wanted, how: dict[str, Any]) -> int:
    """Create a jail and print its name."""
    tenant = settings.tenant
    if name is not None:
        tenant, name = split_name(settings, name)
    body = instance_request(source, name, wanted) | how
    connection = ensure_engine(settings.root)
    operation = connection.call("POST", f"/1.0/instances?project={tenant}", body)
    made = result(
        wait_interruptible(settings, connection, operation, f"{word} {name_of(tenant, name) if name else source}")
    )
    document = {"name": made.get("name", name), "tenant": made.get("tenant", tenant)}
    show(settings, document, lambda: name_of(str(document["tenant"]), str(document["name"])))
    return 0


def wait_interruptible(settings: Settings, connection: Any, operation: dict[str, Any], label: str) -> dict[str, Any]:
    """Wait for what may take minutes: SIGTERM cancels it as ctrl-c does."""
    import signal

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return wait(settings, connection, operation, label)
    finally:
        signal.signal(signal.SIGTERM, before)


def start(settings: Settings, names: Names = None, all_: All = False, wait: Wait = False) -> int:
    """Start jails."""
    return actions.start(settings, names, all_, wait)


def stop(
    settings: Settings,
    names: Names = None,
    all_: All = False,
    force: Force = False,
    timeout: Annotated[
        int | None, typer.Option("--timeout", metavar="S", min=0, help="Seconds init has, then it is killed.")
    ] = None,
) -> int:
    """Stop jails. Init is asked to end, and killed where it takes too long."""
    return actions.stop(settings, names, all_, force, timeout)


def restart(
    settings: Settings, names: Names = None, all_: All = False, force: Force = False, wait: Wait = False
) -> int:
    """Stop jails and start them again."""
    return actions.change(settings, "restart", names, all_, {"force": force, "wait": wait})


def pause(settings: Settings, names: Names = None, all_: All = False) -> int:
    """Freeze every process of jails."""
    return actions.change(settings, "freeze", names, all_, {})


def resume(settings: Settings, names: Names = None, all_: All = False) -> int:
    """Let paused jails go on."""
    return actions.change(settings, "unfreeze", names, all_, {})


def delete(
    settings: Settings,
    names: Names = None,
    all_: All = False,
    force: Annotated[bool, typer.Option("--force", help="Running jails too: they are killed.")] = False,
) -> int:
    """Delete jails and all that is in them."""
    actions.check_targets("delete", names, all_)
    if all_:
        agree(settings, "delete", f"Delete every jail of tenant {settings.tenant}, and all that is in them?")
    return actions.change(settings, "delete", names, all_, {"force": force})


def rename(
    settings: Settings, name: Name, new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")]
) -> int:
    """Rename a stopped jail."""
    tenant, old = split_name(settings, name)
    if new.startswith(f"{tenant}/"):
        new = new[len(tenant) + 1 :]
    check_label("jail", new)
    connection = existing_engine(settings.root)
    operation = connection.call("POST", f"/1.0/instances/{old}?project={tenant}", {"name": new})
    wait(settings, connection, operation, f"rename {name_of(tenant, old)}")
    show(settings, {"name": new, "tenant": tenant}, lambda: "")
    return 0


def list_(
    settings: Settings,
    all_tenants: Annotated[bool, typer.Option("--all-tenants", "-A", help="Jails of every tenant.")] = False,
) -> int:
    """List the tenant's jails, with limits beside usage."""
    return actions.list_(settings, all_tenants)


def info(settings: Settings, name: Name) -> int:
    """Show all there is to know of a jail."""
    tenant, jail = split_name(settings, name)
    view = existing_engine(settings.root).call("GET", f"/1.0/instances/{jail}?project={tenant}")
    show(settings, view, lambda: jail_page(view))
    return 0
