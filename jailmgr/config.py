"""Where an instance of jailmgr keeps what it owns, and the prefix its things carry.

Standard library only, and little of it: every command starts here. Neither `typing` nor what imports it (NamedTuple
too): with the `re`, `enum` and `contextlib` it brings along it costs as much as the interpreter itself.
"""

from __future__ import annotations

import os
from zlib import crc32

from jailmgr.errors import JailmgrError

SOCKET_MAX = 107
"""Bytes a path may have in sockaddr_un, less the final NUL (unix(7))."""


class Record:
    """A value made of its slots, in place of NamedTuple: equal to another of the same."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._values()}"

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)


class Root(Record):
    """Directories and names of one instance.

    `mark` is empty for the host's own, else five letters of its path's checksum; claims.py sees that no two are alike.
    """

    __slots__ = ("at", "etc", "lib", "mark", "run")

    def __init__(self, lib: str, run: str, etc: str, mark: str, at: str = "") -> None:
        self.lib = lib
        self.run = run
        self.etc = etc
        self.mark = mark
        self.at = at

    @property
    def socket(self) -> str:
        """The engine's socket (HTTP)."""
        return f"{self.run}/engine.sock"

    @property
    def users(self) -> str:
        """Directory, which everybody may enter, of the sockets for users who are not root: HTTP, and sessions."""
        return f"{self.at}/users" if self.at else "/run/jailmgr-users"

    @property
    def user_socket(self) -> str:
        return f"{self.users}/engine.sock"

    @property
    def store(self) -> str:
        return f"{self.lib}/store.db"

    @property
    def usage(self) -> str:
        """What jails have used, by the hour."""
        return f"{self.lib}/usage.db"

    @property
    def pool_file(self) -> str:
        return f"{self.lib}/pool/default.img"

    @property
    def pool_tree(self) -> str:
        """The directory that a pool of kind `project` is, mounted on `pool`."""
        return f"{self.lib}/pool/default.tree"

    @property
    def pool(self) -> str:
        """Mount point of the pool, below a 0700 directory."""
        return f"{self.lib}/pool/default"

    @property
    def cache(self) -> str:
        return f"{self.lib}/cache"

    @property
    def link_prefix(self) -> str:
        """First seven bytes of each of our interfaces; `b` or `v` and up to seven more follow (IFNAMSIZ is 16)."""
        return f"jm{self.mark or 'local'}"

    @property
    def cgroup(self) -> str:
        """Name of our group at the top of each hierarchy."""
        return f"jailmgr-{self.mark}" if self.mark else "jailmgr"

    @property
    def lxcfs(self) -> str:
        """Mount point of the instance's lxcfs, in a directory of its own."""
        return f"{self.run}/lxcfs/mount"

    @property
    def table(self) -> str:
        """Name of our nftables tables (inet and bridge)."""
        return f"jailmgr_{self.mark}" if self.mark else "jailmgr"

    def jail_cgroup(self, tenant: str, jail: str) -> str:
        """A jail's group, below each hierarchy's mount point."""
        return f"{self.cgroup}/{tenant}/{jail}"

    def tenant_run(self, tenant: str) -> str:
        """A tenant's runtime directory: the supervisor's socket, lock and log, a state file of each running jail."""
        return f"{self.run}/tenants/{tenant}"

    def jail_lib(self, tenant: str, jail: str) -> str:
        """What outlives the host's reboot of a jail: config.json, console log, how it last ended."""
        return f"{self.lib}/jails/{tenant}/{jail}"

    def volume(self, tenant: str, jail: str) -> str:
        return f"{self.pool}/volumes/{tenant}/{jail}"

    def image(self, fingerprint: str) -> str:
        return f"{self.pool}/images/{fingerprint}"


def find_root(root: str | None = None) -> Root:
    """The instance meant by `--root`, else JAILMGR_ROOT, else the host's own.

    Raises JailmgrError for a relative path, which would be another root in each directory, and for one that can't hold
    a socket (unix(7): 107 bytes).
    """
    at = root or os.environ.get("JAILMGR_ROOT") or ""
    if not at:
        return Root("/var/lib/jailmgr", "/run/jailmgr", "/etc/jailmgr", "")
    if at[0] != "/":
        hint = f"Give the whole path, such as {os.path.abspath(at)}."
        raise JailmgrError(f"root {at}", "the path is not absolute", hint, "invalid")
    at = os.path.realpath(at)
    checksum, mark = crc32(os.fsencode(at)), ""
    for _ in range(5):
        checksum, index = divmod(checksum, 36)
        mark += "0123456789abcdefghijklmnopqrstuvwxyz"[index]
    found = Root(f"{at}/lib", f"{at}/run", f"{at}/etc", mark, at)
    longest = len(os.fsencode(found.users)) + len("/session.sock")
    if longest > SOCKET_MAX:
        raise JailmgrError(
            f"root {at}",
            f"the path of its socket would have {longest} bytes, the kernel takes {SOCKET_MAX}",
            "Choose a shorter path for JAILMGR_ROOT.",
            "invalid",
        )
    return found
