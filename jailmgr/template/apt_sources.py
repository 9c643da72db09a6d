"""Which mirror a Debian-like release is fetched from: the configuration's, else one of the host's own apt sources.

Both of sources.list(5)'s formats are read, as apt reads them: sources.list, then the parts in order of name. What
can't be understood is passed over: it is the admin's file, and apt's business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import tomli

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os

APT = "/etc/apt"
DEBIAN = "debian"
"""The distribution of [build] mirror."""
_PART = re.compile(r"[A-Za-z0-9_.-]+\.(list|sources)\Z", re.ASCII)
_ONE_LINE = re.compile(r"deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)((?:\s+\S+)*)\s*\Z")
_URL_MAX = 400


class Entry(NamedTuple):
    """A source of binary packages. `architectures` is empty where it isn't restricted."""

    url: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    architectures: tuple[str, ...] = ()


class Mirrors(NamedTuple):
    """Empty: not known (debootstrap has a default for the first)."""

    url: str = ""
    security_url: str = ""


Reach = Callable[[str, str], str]
"""Whether a mirror (first) has a suite (second): empty, or why it can't be had."""


def choose_mirrors(
    configured: Mirrors, entries: list[Entry], release: str, releases: list[str], architecture: str, reach: Reach
) -> Mirrors:
    """The mirrors for `release` and its security suite.

    The configuration's; else an entry that names the suite; else one that names a sibling of it (another of the
    template's `releases`) and, asked, has this one as well. `architecture` is dpkg's.
    """
    siblings = [name for name in releases if name != release]
    return Mirrors(
        configured.url or _find(entries, release, siblings, architecture, reach),
        configured.security_url
        or _find(entries, f"{release}-security", [f"{name}-security" for name in siblings], architecture, reach),
    )


def _find(entries: list[Entry], suite: str, siblings: list[str], architecture: str, reach: Reach) -> str:
    usable = [
        entry
        for entry in entries
        if "main" in entry.components and (not entry.architectures or architecture in entry.architectures)
    ]
    for entry in usable:
        if suite in entry.suites:
            return entry.url
    urls = dict.fromkeys(entry.url for entry in usable if not {*siblings}.isdisjoint(entry.suites))
    return next((url for url in urls if not reach(url, suite)), "")


def without_credentials(url: str) -> str:
    """The URL as a jail may know it: the host's user name and password for a mirror are the host's."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def configured_mirrors(root: Root, distribution: str, own: Mirrors) -> Mirrors:
    """Return the configured mirrors of a distribution.

    [mirrors.DISTRIBUTION] of etc/config.toml comes first, then (debian only) its [build], then `own`, the template's.
    Raises JailmgrError `invalid` where config.toml can't be read.
    """
    path = f"{root.etc}/config.toml"
    try:
        with open(path, "rb") as file:
            content = tomli.load(file)
    except FileNotFoundError:
        return own
    except OSError as error:
        raise from_os("configuration", error) from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JailmgrError("configuration", f"{path}: {error}", "", "invalid") from error
    build = _urls(path, content, "build", ("mirror", "security_mirror"))
    tables = content.get("mirrors", {})
    if not isinstance(tables, dict):
        raise JailmgrError("configuration", f"{path}: mirrors must be a table", "", "invalid")
    named = _urls(path, tables, distribution, ("url", "security_url"), "mirrors.")
    general = build if distribution == DEBIAN else Mirrors()
    return Mirrors(named.url or general.url or own.url, named.security_url or general.security_url or own.security_url)


def _urls(path: str, content: dict[str, Any], name: str, keys: tuple[str, str], prefix: str = "") -> Mirrors:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise JailmgrError("configuration", f"{path}: {prefix}{name} must be a table", "", "invalid")
    for key in keys:
        if (url := table.get(key, "")) and not is_url(url):
            why = f"{path}: {prefix}{name}.{key} must be an http or https URL"
            raise JailmgrError("configuration", why, "", "invalid")
    return Mirrors(*((table.get(key) or "").rstrip("/") for key in keys))


def read_sources(directory: str = APT) -> list[Entry]:
    """The entries of the host's apt, in apt's order; none where there is no apt."""
    try:
        parts = sorted(name for name in os.listdir(f"{directory}/sources.list.d") if _PART.match(name))
    except (FileNotFoundError, NotADirectoryError):
        parts = []
    entries: list[Entry] = []
    for path in (f"{directory}/sources.list", *(f"{directory}/sources.list.d/{part}" for part in parts)):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(1 << 20)
        except OSError:
            continue
        entries += parse_deb822(text) if path.endswith(".sources") else parse_one_line(text)
    return entries


def parse_one_line(text: str) -> Iterator[Entry]:
    """`deb [option=value …] URL SUITE COMPONENT…`"""
    for line in text.splitlines():
        match = _ONE_LINE.match(line.partition("#")[0].strip())
        if match is None or not is_url(match[2]):
            continue
        options = dict(option.split("=", 1) for option in (match[1] or "").split() if "=" in option)
        architectures = tuple(filter(None, options.get("arch", "").split(",")))
        yield Entry(match[2].rstrip("/"), (match[3],), tuple(match[4].split()), architectures)


def parse_deb822(text: str) -> Iterator[Entry]:
    """Paragraphs of Types, URIs, Suites, Components (deb822(5)); comments stand anywhere, also within a field."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for paragraph in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields: dict[str, list[str]] = {}
        words: list[str] = []
        for line in paragraph.splitlines():
            if line[:1] in (" ", "\t"):
                words += line.split()
                continue
            name, colon, value = line.partition(":")
            words = value.split()
            if colon:
                fields[name.strip().lower()] = words
        enabled = [word.lower() for word in fields.get("enabled", [])]
        if "deb" not in fields.get("types", []) or enabled in (["no"], ["false"], ["0"]):
            continue
        for url in filter(is_url, fields.get("uris", [])):
            suites, components = tuple(fields.get("suites", [])), tuple(fields.get("components", []))
            yield Entry(url.rstrip("/"), suites, components, tuple(fields.get("architectures", [])))


def is_url(url: object) -> bool:
    """One that debootstrap, and apt in a jail, can fetch from; it is written into files of a line each."""
    plain = isinstance(url, str) and re.match(r"https?://[!-~]+\Z", url) and len(url) <= _URL_MAX
    return bool(plain) and not re.search(r"[\[\]<>\"'`$|\\]", str(url))
