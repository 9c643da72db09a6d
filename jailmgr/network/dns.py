"""Names of jails, and the world's, for the jails of a network: a dnsmasq(8) on each bridge's own addresses.

It outlives the engine, which finds it again by its command line. It drops root's rights, and what it reads lies behind
our 0700 directories: so it is started in a mount namespace of its own, with the names' directory at a reachable place.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jailmgr.claims import locked
from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.model import Network
from jailmgr.runtime import scope
from jailmgr.runtime.mount_namespace import enter_own
from jailmgr.runtime.syscalls import move_mount, open_tree

DOMAIN = "jailmgr"
"""The domain of the jails' names. dnsmasq knows them without it, too."""

RESOLV_CONF = "/etc/resolv.conf"
USERS = ("dnsmasq", "nobody")
DOORS = ("/media", "/mnt", "/srv", "/opt", "/home")
"""Directories of the host, any of which is the names' in dnsmasq's own mount namespace."""

START_S, STOP_S = 10.0, 2.0


def ensure_dns(root: Root, network: Network, names: dict[str, tuple[str, str]]) -> None:
    """Has a network's dnsmasq run and know these names (to IPv4 and IPv6 address) and no others.

    The bridge must be up. Idempotent; a dnsmasq that died is started anew, one of another version replaced.
    Raises JailmgrError, `unavailable` where dnsmasq is not installed.
    """
    place = _place(root, network.id)
    try:
        with locked(str(place)):
            changed = _write_names(place / "hosts" / "names", names)
            with _running(place) as running:
                if running is not None and running[1] == _command(place, network):
                    if changed:
                        _send(running[0], signal.SIGHUP)
                    return
                if running is not None:
                    _end(running[0])
            _start(place, network)
            # It outlives the engine, and so it is in no group of a service's.
            pid = int((place / "pid").read_text())
            scope.move_apart(
                f"{root.cgroup}-dns-{network.id}.scope", f"Names of jails, for network {network.name}", pid
            )
    except OSError as error:
        raise from_os(f"DNS of network {network.name}", error) from error


def tell_dns(root: Root, network: Network, names: dict[str, tuple[str, str]]) -> None:
    """Has a network's dnsmasq know these names and no others, where one runs: none is started, so that a jail can be
    deleted on a host where none can be. Raises JailmgrError.
    """
    place = _place(root, network.id)
    try:
        if not place.is_dir():
            return
        with locked(str(place)):
            changed = _write_names(place / "hosts" / "names", names)
            with _running(place) as running:
                if running is not None and changed:
                    _send(running[0], signal.SIGHUP)
    except OSError as error:
        raise from_os(f"DNS of network {network.name}", error) from error


def is_served(root: Root, network: Network) -> bool:
    """Whether a network's dnsmasq runs, with the command line it should have."""
    place = _place(root, network.id)
    with _running(place) as running:
        return running is not None and running[1] == _command(place, network)


def stop_dns(root: Root, network_id: int) -> None:
    """Ends a network's dnsmasq and forgets its names; fine where there is none. Raises JailmgrError."""
    place = _place(root, network_id)
    try:
        if not place.is_dir():
            return
        with locked(str(place)):
            with _running(place) as running:
                if running is not None:
                    _end(running[0])
            shutil.rmtree(place)
        with contextlib.suppress(OSError):
            place.parent.rmdir()
    except OSError as error:
        raise from_os("DNS", error) from error


def list_dns(root: Root) -> list[int]:
    """Ids of networks that have a dnsmasq, or had one."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(entry.name) for entry in Path(root.run, "dns").iterdir() if entry.name.isdigit())
    return []


def _place(root: Root, network_id: int) -> Path:
    return Path(root.run, "dns", str(network_id))


def _command(place: Path, network: Network) -> list[str]:
    """dnsmasq's command line, by which it is known again."""
    user = next((name for name in USERS if _group(name)), "nobody")
    return [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        f"--pid-file={place}/pid",
        f"--user={user}",
        f"--group={_group(user) or 'nogroup'}",
        "--log-facility=-",
        "--bind-interfaces",
        "--except-interface=lo",
        f"--listen-address={network.ipv4.partition('/')[0]}",
        f"--listen-address={network.ipv6.partition('/')[0]}",
        f"--resolv-file={RESOLV_CONF}",
        "--no-hosts",
        f"--addn-hosts={_door(place)}",
        f"--domain={DOMAIN}",
        f"--local=/{DOMAIN}/",
        "--expand-hosts",
        "--domain-needed",
        "--bogus-priv",
        "--cache-size=400",
    ]


@functools.cache
def _group(user: str) -> str:
    """Name of a user's own group; empty where there is no such user. Kept: it is two files to read at each start."""
    try:
        return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        return ""


def _write_names(path: Path, names: dict[str, tuple[str, str]]) -> bool:
    """hosts(5), replaced as a whole; whether it differs from before."""
    lines = [f"{address} {name}\n" for name in sorted(names) for address in names[name]]
    text = "".join(lines)
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == text:
            return False
    path.parent.mkdir(exist_ok=True)
    path.parent.chmod(0o755)
    # dnsmasq passes over names that begin with a dot.
    fresh = path.parent / ".new"
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.rename(path)
    return True


def _door(place: Path) -> str:
    """Where dnsmasq finds the names: a directory that hides nothing it needs."""
    needed = [str(place), os.path.realpath(RESOLV_CONF)]
    fit = [door for door in DOORS if os.path.isdir(door) and not any(path.startswith(f"{door}/") for path in needed)]
    if not fit:
        raise JailmgrError("DNS", f"this host has none of {', '.join(DOORS)}", "Make one of these directories.")
    return fit[0]


def _start(place: Path, network: Network) -> None:
    """Starts dnsmasq, nobody's child, and waits for its word that it serves."""
    what = f"DNS of network {network.name}"
    program = shutil.which("dnsmasq", path="/usr/sbin:/usr/local/sbin:/usr/bin:/sbin")
    if program is None:
        raise JailmgrError(what, "dnsmasq is not installed", "apt install dnsmasq-base", "unavailable")
    reading, writing = os.pipe()
    try:
        # unshare(2) is for a thread: one of its own, since there is no way back that is worth the name.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_spawn, place, [program, *_command(place, network)[1:]], writing).result()
        os.close(writing)
        writing = -1
        told = _await(reading)
    except subprocess.SubprocessError as error:
        raise JailmgrError(what, f"dnsmasq could not be started: {error}") from error
    except OSError as error:
        raise from_os(what, error) from error
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    if "started, version" not in told:
        raise JailmgrError(
            what,
            told.strip().rpartition("\n")[2].removeprefix("dnsmasq: ") or "dnsmasq did not start",
            f"Does another program listen on port 53 of {network.ipv4.partition('/')[0]}?",
        )


def _spawn(place: Path, command: list[str], stderr: int) -> None:
    """Runs a command in a new mount namespace where the names are at their door, by a thread that ends then."""
    names = open_tree(str(place / "hosts"))
    try:
        enter_own([str(place), os.path.realpath(RESOLV_CONF), command[0], "/usr/lib", "/proc", "/dev", "/etc"])
        door = os.open(_door(place), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            move_mount(names, door)
        finally:
            os.close(door)
    finally:
        os.close(names)
    # setsid(1) forks: a dnsmasq that ends is init's to reap, however long the engine lives.
    subprocess.run(
        ["setsid", "--fork", *command],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        cwd="/",
        env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )


def _await(reading: int) -> str:
    """What dnsmasq says until it serves, ends or START_S have passed."""
    told = b""
    while b"started, version" not in told and _ready(reading, START_S):
        chunk = os.read(reading, 4096)
        if not chunk:
            break
        told += chunk
    return told.decode(errors="replace")


def _ready(fd: int, seconds: float) -> bool:
    """Waits until a descriptor can be read (a pidfd: until its process has ended); whether it can."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@contextlib.contextmanager
def _running(place: Path) -> Iterator[tuple[int, list[str]] | None]:
    """This network's dnsmasq as pidfd and argv, by its pid file and its command line; None where there is none."""
    try:
        pid = int((place / "pid").read_text())
        # First the descriptor and then the look: the number may be another's by now.
        pidfd = os.pidfd_open(pid)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        yield None
        return
    try:
        arguments = _arguments(pid)
        yield (pidfd, arguments) if f"--pid-file={place}/pid" in arguments else None
    finally:
        os.close(pidfd)


def _arguments(pid: int) -> list[str]:
    """argv of a process, its program's directory left out; empty where it is gone."""
    try:
        words = Path("/proc", str(pid), "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
    return [os.path.basename(words[0]), *words[1:]] if words else []


def _send(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _end(pidfd: int) -> None:
    """SIGTERM, and SIGKILL where that doesn't do."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _send(pidfd, number)
        if _ready(pidfd, STOP_S):
            return
