"""The one exception a user may see: what was tried, why it failed, and what to do.

Standard library only: the runtime and the hot commands import it.
"""

from __future__ import annotations

STATUS = {
    "invalid": 400,
    "denied": 403,
    "missing": 404,
    "exists": 409,
    "conflict": 409,
    "full": 507,
    "unavailable": 503,
    "failed": 500,
}
"""HTTP status of each error code (RFC 9110; 507 is RFC 4918's)."""


KERNEL_HINT = "The kernel lacks it: `jailmgr doctor` tells what a host needs."
_ENOSYS = 38
"""Function not implemented; alike on every machine Linux runs on that jailmgr does."""


class JailmgrError(Exception):
    """An operation that could not be done, told as `WHAT: WHY` and a hint.

    `code` is a key of `STATUS`. Nothing was changed when it is raised, or what was changed has been undone.
    """

    def __init__(self, what: str, why: str, hint: str = "", code: str = "failed") -> None:
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why
        self.hint = hint
        self.code = code

    def as_dict(self) -> dict[str, str]:
        """The error as it travels over HTTP and the supervisor's socket."""
        return {"what": self.what, "why": self.why, "hint": self.hint, "code": self.code}


def full_name(tenant: str, jail: str) -> str:
    """A jail's name that means it in every context. In errors, and in the commands of hints, it has no other.

    The command line leaves out the caller's own tenant (cli/settings.py: `in_context`).
    """
    return f"{tenant}/{jail}"


def from_dict(told: dict[str, str]) -> JailmgrError:
    """The error that `as_dict` told, on the other side of a socket."""
    code = told.get("code", "failed")
    return JailmgrError(
        told.get("what", "jailmgr"),
        told.get("why", "failed"),
        told.get("hint", ""),
        code if code in STATUS else "failed",
    )


def from_os(what: str, error: OSError, hint: str = "") -> JailmgrError:
    """An OSError met while doing `what`, with the file's name where the kernel gave one."""
    why = error.strerror or str(error)
    if error.filename is not None:
        why = f"{error.filename!s}: {why}"
    if error.errno == _ENOSYS:
        return JailmgrError(what, why, hint or KERNEL_HINT, "unavailable")
    return JailmgrError(what, why, hint)
