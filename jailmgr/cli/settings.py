"""What the global options ask for, and the names of jails as users write them.

On the way of every command: no imports beyond what the interpreter has already loaded.
"""

from __future__ import annotations

import os

from jailmgr.config import Record, Root, find_root
from jailmgr.errors import JailmgrError, full_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Settings(Record):
    """The global options of one command. `format`: table, json, yaml or csv."""

    __slots__ = ("format", "quiet", "root", "tenant", "yes")

    def __init__(self, root: Root, tenant: str, format_: str, quiet: bool, yes: bool) -> None:
        self.root = root
        self.tenant = tenant
        self.format = format_
        self.quiet = quiet
        self.yes = yes


class Cancelled(JailmgrError):
    """The user interrupted, and what had begun was undone; or could not be, and `why` says so. Exit status 130."""


def settle(given: dict[str, Any]) -> Settings:
    """Settings of the options given; the environment and the defaults speak where none was.

    Raises JailmgrError (invalid) for a tenant that is no DNS label or a root whose socket's path is too long.
    """
    tenant = given.get("tenant") or os.environ.get("JAILMGR_TENANT") or "default"
    check_label("tenant", tenant)
    return Settings(
        find_root(given.get("root")),
        tenant,
        given.get("format") or "table",
        bool(given.get("quiet")),
        bool(given.get("yes")),
    )


def check_label(noun: str, name: str) -> None:
    """JailmgrError unless `name` is a DNS label in lower case (RFC 1123, section 2.1; at most 63 bytes, RFC 1035)."""
    fits = name.replace("-", "a").isalnum() and name.isascii() and name == name.lower()
    if not fits or len(name) > 63 or name[0] == "-" or name[-1] == "-":
        raise JailmgrError(
            f"{noun} {name!r}",
            "the name is not a DNS label",
            "Use 1 to 63 of a-z, 0-9 and -, with no - at either end.",
            "invalid",
        )


def split_name(settings: Settings, text: str) -> tuple[str, str]:
    """Tenant and jail of `NAME` or `TENANT/NAME`. Raises JailmgrError where either is no DNS label."""
    tenant, slash, name = text.rpartition("/")
    if slash:
        check_label("tenant", tenant)
    check_label("jail", name)
    return tenant if slash else settings.tenant, name


def context() -> str:
    """The tenant that a bare name means in the caller's next command: `--tenant` is gone by then."""
    return os.environ.get("JAILMGR_TENANT") or "default"


def name_of(tenant: str, jail: str) -> str:
    """A jail's name as the user may give it to the next command."""
    return jail if tenant == context() else full_name(tenant, jail)


def in_context(text: str) -> str:
    """An error's text with the jails of the caller's own tenant named without it.

    A name is what follows `jail`, or a command in a hint: `jailmgr stop acme/web`.
    """
    words, own = text.split(" "), f"{context()}/"
    for at, word in enumerate(words):
        before = words[at - 1] if at else ""
        named = before in ("jail", "mean") or (at > 1 and words[at - 2].endswith("jailmgr") and before in _OF_JAILS)
        if named and word.startswith(own):
            words[at] = word[len(own) :]
    return " ".join(words)


_OF_JAILS = ("start", "stop", "restart", "resume", "logs")
"""Commands that hints give with a jail's name."""


def require_root() -> None:
    """JailmgrError unless the caller is root."""
    if os.geteuid() != 0:
        raise JailmgrError("jailmgr", "only root may do this", "Run it with sudo.", "denied")


def require_door(root: Root) -> None:
    """JailmgrError unless the caller is root, or there is a door for others (engine/door.py)."""
    if os.geteuid() != 0 and not os.path.exists(root.user_socket):
        require_root()


def wrong_usage(what: str, why: str, hint: str = "") -> JailmgrError:
    """The error of a command line that cannot be right on any host."""
    return JailmgrError(what, why, hint, "invalid")
