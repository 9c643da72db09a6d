"""A whole Debian in a jail of the lab VM: systemd under cgroup v2 alone, AppArmor and a pool of project quotas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.instance import Instance, terminal, until
from tests.vm.carried import take

LASTING = "lasting"
BOOTS_WITHIN = 300
SANDBOX = (
    "PrivateTmp=yes", "PrivateDevices=yes", "ProtectSystem=strict", "ProtectHome=yes", "ProtectKernelTunables=yes",
    "NoNewPrivileges=yes", "DynamicUser=yes", "PrivateNetwork=yes", "MemoryMax=64M", "TasksMax=20",
)  # fmt: skip


@pytest.fixture(scope="session")
def source(host: Instance) -> str:
    """The image, by the start of its fingerprint."""
    if not any("carried" in image["aliases"] for image in host.json("image", "list")):
        host("launch", "busybox", "first", within=BOOTS_WITHIN)
        host("delete", "--force", "first")
        return take(host)[:12]
    return "carried"


@pytest.fixture(scope="module")
def web(host: Instance, source: str) -> Iterator[str]:
    host("launch", source, "web", "--memory", "512MiB", "--wait", within=BOOTS_WITHIN)
    yield "web"
    host("delete", "--force", "web")


def test_it_is_up_with_no_unit_failed(host: Instance, web: str) -> None:
    assert host.exec(web, "systemctl", "is-system-running").out == "running\n"
    assert host.exec(web, "systemctl", "--failed", "--no-legend").out == ""
    assert host.info(web)["apparmor"] == "jailmgr (enforce)"


def test_exec_while_the_guest_has_controllers_enabled(host: Instance, web: str) -> None:
    """No process may be in a group whose controllers are given on (cgroup-v2.rst, "No Internal Process Constraint")."""
    enabled = host.exec(web, "cat", "/sys/fs/cgroup/cgroup.subtree_control").out.split()
    assert {"memory", "pids"} <= set(enabled)
    assert host.exec(web, "cat", "/proc/self/cgroup").out == "0::/.exec\n"
    own = "cd /sys/fs/cgroup/.exec && mkdir x && echo $$ >x/cgroup.procs && echo +memory +pids >cgroup.subtree_control"
    assert host.sh(web, f"{own} && echo 64M >x/memory.max && cat x/memory.max").out == f"{64 << 20}\n"
    assert host.exec(web, "cat", "/proc/self/cgroup").out == "0::/.exec\n", "the leaf is made again"


def test_a_sandboxed_service_with_limits_of_its_own(host: Instance, web: str) -> None:
    options = [f"--property={text}" for text in SANDBOX]
    script = "cat /sys/fs/cgroup/$(cut -d: -f3 /proc/self/cgroup)/memory.max; id -u; touch /etc/x"
    ended = host.exec(web, "systemd-run", "--wait", "--pipe", "--quiet", *options, "sh", "-c", script, status=1)
    assert ended.out.splitlines()[0] == str(64 << 20)
    assert 61184 <= int(ended.out.splitlines()[1]) <= 65519, "DynamicUser="
    assert "Read-only file system" in ended.err


def test_sudo_and_namespaces(host: Instance, web: str) -> None:
    assert host.exec(web, "sudo", "-u", "nobody", "id", "-un").out == "nobody\n"
    assert host.exec(web, "sudo", "-n", "-u", "nobody", "sudo", "-n", "true", status=1).out == ""
    assert host.exec(web, "unshare", "--mount", "sh", "-c", "mount -t tmpfs x /mnt && echo mounted").out == "mounted\n"
    assert host.exec(web, "unshare", "--user", "--map-root-user", "id", "-u").out == "0\n"


def test_a_login_shell_is_a_session_of_logind(host: Instance, web: str) -> None:
    with terminal(host, "shell", web) as term:
        term.prompt(60)
        term.write(b"echo at $XDG_RUNTIME_DIR; cat /proc/self/cgroup; echo end$((1))\n")
        said = term.expect(b"end1", 60).decode()
        term.write(b"exit 7\n")
        assert term.wait(60) == 7
    assert "/run/user/0" in said
    assert "/session-" in said


@pytest.mark.before_reboot
def test_before(host: Instance, source: str) -> None:
    host("launch", source, LASTING, "-c", "boot.autostart=true", "--wait", within=BOOTS_WITHIN)
    host.sh(LASTING, "echo kept > /root/note && sync")


@pytest.mark.after_reboot
def test_after(host: Instance) -> None:
    until(lambda: host.status(LASTING) == "Running", BOOTS_WITHIN, "it is started with the host")
    up = "timeout 200 systemctl is-system-running --wait"
    assert host("exec", LASTING, "--", "sh", "-c", up, within=BOOTS_WITHIN).out == "running\n"
    assert host.exec(LASTING, "cat", "/root/note").out == "kept\n"
    assert Path(f"/proc/{host.info(LASTING)['init_pid']}/attr/current").read_text() == "jailmgr (enforce)\n"
    assert host.info(LASTING)["last_ended"]["by"] == "host"
