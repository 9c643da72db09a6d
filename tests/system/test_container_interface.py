"""What a guest finds of its container manager: docs/container-interface.md has a table of all clauses."""

from __future__ import annotations

from tests.system.conftest import MakeJail
from tests.system.instance import Instance, Terminal, terminal, until

INITTAB = """\
::sysinit:/bin/hostname -F /etc/hostname
console::respawn:/sbin/getty 38400 console
"""
"""As Alpine's for a container: a login on the console (busybox init, openrc)."""


def boot_busybox_init(jm: Instance, name: str) -> None:
    """Give the jail busybox' own init in place of the template's script, and a root without a password."""
    jm("cp", "-", f"{name}:/etc/inittab", stdin=INITTAB.encode())
    jm.sh(name, "rm /sbin/init && ln -s /bin/busybox /sbin/init && sed -i s/^root:x:/root::/ /etc/passwd")
    jm("restart", "--force", name)


def runs(jm: Instance, name: str, argument: str) -> bool:
    return jm.sh(name, f"ps -o args | grep -qx 'sleep {argument}'", status=None).status == 0


def use_job_control(jm: Instance, name: str, term: Terminal) -> None:
    """Interrupt, stop and continue what runs on the console, whose shell has just shown its prompt."""
    term.write(b"sleep 1000; echo st''atus $?\n")
    until(lambda: runs(jm, name, "1000"))  # what is typed before goes to the shell that starts it
    term.write(b"\x03")
    term.prompt()
    term.write(b"sleep 2000\n")
    until(lambda: runs(jm, name, "2000"))
    term.write(b"\x1a")
    term.expect(b"Stopped")
    term.write(b"bg && kill %1; wait %1; echo le''ft $?\n")
    term.expect(b"left 143")


def test_template_console_has_job_control(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    with terminal(jm, "console", name) as term:
        term.expect(b"leaves it")
        term.prompt()
        use_job_control(jm, name, term)


def test_console_login_of_busybox_init(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    boot_busybox_init(jm, name)
    with terminal(jm, "console", name) as term:
        term.expect(b"leaves it")
        until(lambda: "login:" in jm("logs", name).out, 10, "a login on the console")
        term.write(b"root\n")
        term.prompt()
        use_job_control(jm, name, term)
        term.write(b"sleep 3000\n")
        until(lambda: runs(jm, name, "3000"))
        jm.sh(name, "kill -KILL $(ps -o ppid,args | sed -n 's/ *sleep 3000$//p')")
        term.expect(b"login:")
        until(lambda: not runs(jm, name, "3000"), 5, "the terminal's session has ended: what it ran is hung up")
