"""The Debian package's parts that need no build: manual pages, completions, dependencies, versions."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from debbuild.__main__ import SCRIPTS, parse
from debbuild.commands import HELP, read_commands, walk
from debbuild.completions import SHELLS, completion
from debbuild.control import depends
from debbuild.manual import pages
from jailmgr.manager.doctor.host import SYSCTLS
from labvm.tree import TREE

ROOT = read_commands()
REQUESTS = re.compile(r"\.(TH|SH|SS|TP|PP|EX|EE|br)\b|\\&\.")
JAILS = "name,tenant,status\\nweb,default,Running\\ndb,default,Stopped\\n"


def test_each_command_has_a_page_that_tells_all_of_its_options() -> None:
    told = pages(ROOT, "1.2.3", 0)
    assert {"jailmgr.1", "jailmgr-launch.1", "jailmgr-image.1"} <= told.keys()
    for command in walk(ROOT):
        page = told["-".join(("jailmgr", *command.words[:1])) + ".1"].replace(r"\-", "-")
        assert command.example in page.replace(r"\(aq", "'")
        own = [option for option in command.options if not (option.hidden or option is HELP)]
        own = [] if command.words and command.commands else own
        names = [name for option in own for name in option.names]
        names += [argument.metavar for argument in command.arguments]
        assert [name for name in names if f"{name}\\fR" not in page] == []


def test_pages_have_no_line_that_is_a_request_by_mistake() -> None:
    lines = [line for page in pages(ROOT, "1.2.3", 0).values() for line in page.splitlines()]
    assert [line for line in lines if line[:1] in ".'" and not REQUESTS.match(line)] == []
    assert '.TH JAILMGR\\-LIST 1 1970-01-01 "jailmgr 1.2.3" "jailmgr manual"' in lines


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `jailmgr` that knows two jails; the file has the command lines it was given."""
    log, program = tmp_path / "asked", tmp_path / "jailmgr"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nprintf "{JAILS}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    log.touch()
    return log


def _complete(line: str, tmp_path: Path) -> list[str]:
    script = tmp_path / "completion"
    script.write_text(completion("bash", ROOT))
    # There is no line editor here for compopt to speak to.
    act = 'compopt() { :; }; . "$1"; COMP_LINE=$2 COMP_POINT=${#2}; _jailmgr; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", act, "bash", script, line], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("jailmgr la", ["launch"]),
        ("jailmgr --format table lis", ["list"]),
        ("jailmgr image s", ["show"]),
        ("jailmgr launch d", ["debian"]),
        ("jailmgr launch debian x", []),
        ("jailmgr launch --mem", ["--memory"]),
        ("jailmgr list --format=js", ["json"]),
        ("jailmgr -q list --format ya", ["yaml"]),
        ("jailmgr start ", ["web", "db"]),
        ("jailmgr start web d", ["db"]),
        ("jailmgr stop --timeout w", []),
        ("jailmgr exec web ", []),
        ("jailmgr exec web -- w", []),
        ("jailmgr port publish w", ["web"]),
        ("jailmgr set web limits.memory", ["limits.memory=", "limits.memory.min=", "limits.memory.swap="]),
        ("jailmgr launch busybox -c rest", ["restart="]),
        ("jailmgr get web rest", ["restart"]),
        ("jailmgr cp w", ["web:"]),
    ],
)
def test_bash_completes(line: str, found: list[str], asked: Path, tmp_path: Path) -> None:
    assert _complete(line, tmp_path) == found


def test_only_a_jails_name_takes_a_command_and_of_the_tenant_meant(asked: Path, tmp_path: Path) -> None:
    _complete("jailmgr launch ", tmp_path)
    _complete("jailmgr image show ", tmp_path)
    assert asked.read_text() == ""
    _complete("jailmgr --tenant acme stop ", tmp_path)
    assert asked.read_text() == "--tenant acme list --format csv\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_knows_each_command_and_option(shell: str) -> None:
    text = completion(shell, ROOT)
    assert re.findall("@[A-Z]+@", text) == []
    names = {name for command in walk(ROOT) for option in command.options for name in option.names}
    names |= {word for command in walk(ROOT) for word in command.words}
    if shell == "fish":
        names = {re.sub("^-(?!l )", "-s ", re.sub("^--", "-l ", name)) for name in names}
    assert [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)] == []


def test_the_package_depends_on_one_python_and_on_what_jailmgr_needs() -> None:
    needed = subprocess.run([TREE / "script/apt-packages", "run"], capture_output=True, text=True, check=True).stdout
    found = depends("3.11")
    assert {"python3 (>= 3.11)", "python3 (<< 3.12)"} <= {*found}
    assert {*needed.split()} - {"python3", "python3-venv"} <= {*found}
    assert "python3-venv" not in found


def test_versions() -> None:
    assert parse(["--version", "1.2.3+1"]).version == "1.2.3+1"
    for wrong in ("1.2-3", "v1", "1.2~3", ""):
        with pytest.raises(SystemExit):
            parse([f"--version={wrong}"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_maintainer_scripts_are_shell(name: str) -> None:
    subprocess.run(["sh", "-n", TREE / "packaging/debian" / name], check=True)


@pytest.fixture
def maintainer(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a maintainer script on a host that is made up, and gives the commands that it ran, but for the usual ones.

    What it names of the host is looked for below `tmp_path`; `failing` is a command line that doesn't succeed.
    """
    log = tmp_path / "log"
    fake = f'#!/bin/sh\nline="${{0##*/}} $*"; echo "$line" >> {log}; [ "$line" != "$FAILING" ]\n'
    commands = ["jailmgr", "deb-systemd-invoke", "deb-systemd-helper", "systemctl", "find", "systemd-tmpfiles"]
    paths = [f"bin/{name}" for name in commands] + ["lib/systemd/systemd-sysctl", "usr/lib/jailmgr/bin/python3"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(fake)
        (tmp_path / path).chmod(0o755)
    for path in ("run/systemd/system", "run/jailmgr"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "run/jailmgr/engine.lock").touch()

    def run(name: str, *argv: str, failing: str = "") -> list[str]:
        text = (TREE / "packaging/debian" / name).read_text()
        text = re.sub(r"(?<![\w/])/(?=(run|usr|lib|etc|sys)/)", f"{tmp_path}/", text)
        log.write_text("")
        path = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "FAILING": failing}
        done = subprocess.run(["sh", "-c", text, name, *argv], env=path, capture_output=True, text=True)
        assert (done.returncode == 0) is not failing.startswith("jailmgr engine"), done.stderr
        return [line for line in log.read_text().splitlines() if line.startswith(("jailmgr ", "deb-systemd-invoke "))]

    return run


def test_a_removal_ends_the_engine_before_it_stops_the_jails(maintainer: Callable[..., list[str]]) -> None:
    stop = "deb-systemd-invoke stop jailmgr-autostart.service jailmgr.socket jailmgr-users.socket jailmgr.service"
    first = [stop, "jailmgr --quiet engine stop", "jailmgr engine shutdown"]
    assert maintainer("prerm", "remove") == [*first, "jailmgr --quiet list", "jailmgr --quiet engine stop", stop]
    assert maintainer("prerm", "remove", failing="jailmgr engine shutdown") == first
    assert maintainer("prerm", "upgrade", "1.2.3") == []


@pytest.mark.parametrize("why", ["abort-remove", "abort-deconfigure"])
@pytest.mark.parametrize("listens", [True, False])
def test_a_removal_that_failed_is_undone(maintainer: Callable[..., list[str]], why: str, listens: bool) -> None:
    """However far it came: `list` starts the socket unit again."""
    asked = "" if listens else "systemctl --quiet is-active jailmgr.socket"
    ran = maintainer("postinst", why, failing=asked)
    assert ran[-1] == "deb-systemd-invoke start jailmgr.socket jailmgr-autostart.service jailmgr-users.socket"


def test_an_upgrade_starts_the_engine_anew_and_nothing_else(maintainer: Callable[..., list[str]]) -> None:
    assert maintainer("postinst", "configure", "1.2.3") == ["deb-systemd-invoke try-restart jailmgr.service"]


def test_sysctl_file_gives_what_doctor_wants() -> None:
    lines = (TREE / "packaging/sysctl/jailmgr.conf").read_text().splitlines()
    values = dict(line.split(" = ") for line in lines if line and line[0] != "#")
    # The kernel sets user.*, and the engine raises what comes with a module that is loaded later.
    given = {name: int(values[name]) for name in SYSCTLS if not name.startswith(("user.", "net.netfilter."))}
    assert given
    assert [name for name, value in given.items() if value < SYSCTLS[name][0]] == []
