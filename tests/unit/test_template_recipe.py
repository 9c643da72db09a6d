"""Templates as they are found, checked and resolved; mistakes are told by file, line and key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.template import positions, recipe
from jailmgr.template.schema import Mistake, find_mistakes

TEMPLATES = Path(__file__).parents[2] / "templates"
GOOD = """\
description = "A trial"
method = "debootstrap"
releases = ["one", "two"]

[debootstrap]
keyring = "/usr/share/keyrings/x.gpg"

[packages]
less = "to read"

[init]
stop_timeout = 5

[[file]]
path = "/etc/hostname"
source = "hostname.j2"
when = "create"

[[file]]
path = "/etc/motd"
source = "motd"

[[run]]
command = ["/bin/true"]

[clean]
remove = ["/var/log/*"]

[variants.small]
description = "Less"
without = ["less"]
packages = {nano = "to write"}
init = {stop_signal = "SIGPWR"}
"""
SOURCES = {"hostname.j2": "{{ jail.name }}\n", "motd": "{% not Jinja\n"}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(f"{tmp_path}/lib", f"{tmp_path}/run", f"{tmp_path}/etc", "aaaaa", str(tmp_path))


def put(root: Root, name: str, text: str = GOOD, sources: dict[str, str] | None = None) -> Path:
    folder = Path(root.etc, "templates", name)
    (folder / "files").mkdir(parents=True)
    (folder / "template.toml").write_text(text)
    for source, content in (SOURCES if sources is None else sources).items():
        (folder / "files" / source).write_text(content)
    return folder


@pytest.mark.parametrize("name", ["debian", "busybox"])
def test_own_templates_have_no_mistakes(name: str) -> None:
    assert recipe.validate(str(TEMPLATES / name)) == []


def test_debian_has_a_reason_for_each_package() -> None:
    template = recipe.load_template(str(TEMPLATES / "debian"))
    assert {"iproute2", "iputils-ping", "less", "procps", "nano", "ca-certificates", "systemd-sysv"} <= {
        *template.body.packages
    }
    assert all(len(reason.split()) > 2 for reason in template.body.packages.values())


def test_own_templates_name_no_host() -> None:
    for file in TEMPLATES.rglob("*"):
        if file.is_file():
            assert "://" not in file.read_text(), file


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "word"),
    [
        ('description = "A trial"', "", 1, "", "`description` is missing"),
        ('method = "debootstrap"', 'method = "dd"', 2, "method", "must be one of"),
        ('releases = ["one", "two"]', "releases = []", 3, "releases", "at least 1"),
        ('releases = ["one", "two"]', 'releases = ["one", "../two"]', 3, "releases", "'../two'"),
        ("[debootstrap]", "[debotstrap]", 5, "debotstrap", "did you mean `debootstrap`"),
        ('keyring = "/usr/share/keyrings/x.gpg"', "", 5, "debootstrap", "`keyring` is missing"),
        ('less = "to read"', 'less = ""', 9, "packages.less", "what it is for"),
        ('less = "to read"', '"--no-check-gpg" = "sneaky"', 9, "packages.--no-check-gpg", "a package's name"),
        ("stop_timeout = 5", "stop_timeout = true", 12, "init.stop_timeout", "whole number"),
        ("stop_timeout = 5", "stop_timout = 5", 12, "init.stop_timout", "did you mean `stop_timeout`"),
        ("stop_timeout = 5", 'stop_signal = "SIGNONE"', 12, "init.stop_signal", "name of a signal"),
        ('path = "/etc/hostname"', 'path = "../hostname"', 15, "file.0.path", "absolute"),
        ('when = "create"', 'when = "later"', 17, "file.0.when", "must be one of"),
        ('source = "motd"', 'source = "../../etc/shadow"', 21, "file.1.source", "name of a file"),
        ('source = "motd"', 'source = "mtd"', 21, "file.1.source", "no file `mtd`"),
        ('source = "motd"', 'source = "motd"\nlink = "x"', 19, "file.1", "either"),
        ('source = "motd"', 'source = "motd"\nwhen = "create"', 21, "file.1.source", "end in `.j2`"),
        ('source = "motd"', 'source = "motd"\nmode = 644', 22, "file.1.mode", "0o644"),
        ('source = "motd"', 'source = "motd"\nmode = 420', 22, "file.1.mode", "420 is decimal"),
        ('source = "motd"', 'source = "motd"\nmode = "0644"', 22, "file.1.mode", "0o644"),
        ('source = "motd"', 'source = "motd"\nmode = 0o10000', 22, "file.1.mode", "0o7777"),
        ('path = "/etc/motd"', 'path = "/etc/hostname"', 20, "file.1.path", "line 15"),
        ('command = ["/bin/true"]', 'command = "/bin/true"', 24, "run.0.command", "a program and its arguments"),
        ('command = ["/bin/true"]', 'command = ["true"]', 24, "run.0.command", "absolute"),
        ('remove = ["/var/log/*"]', 'remove = ["/var/*/log"]', 27, "clean.remove", "last part"),
        ('remove = ["/var/log/*"]', 'remove = ["/*/../x"]', 27, "clean.remove", "'/*/../x'"),
        ("[variants.small]", '[variants."../x"]', 29, "variants.../x", "a name"),
        ('without = ["less"]', 'wthout = ["less"]', 31, "variants.small.wthout", "did you mean `without`"),
        (
            'init = {stop_signal = "SIGPWR"}',
            "init = {stop_timeout = 0}",
            33,
            "variants.small.init.stop_timeout",
            "from 1",
        ),
        ('init = {stop_signal = "SIGPWR"}', "init = 1", 33, "variants.small.init", "a table"),
    ],
)
def test_mistakes(old: str, new: str, line: int, key: str, word: str) -> None:
    assert old in GOOD
    mistakes = find_mistakes(GOOD.replace(old, new), SOURCES)
    told = {(mistake.file, mistake.line, mistake.key): mistake.what for mistake in mistakes}
    assert word in told["template.toml", line, key]


def test_files_of_the_build_know_no_jail() -> None:
    (mistake,) = find_mistakes(GOOD.replace('when = "create"', ""), SOURCES)
    assert (mistake.file, mistake.line, mistake.key) == ("files/hostname.j2", 1, "jail.name")


def test_good_has_none() -> None:
    assert find_mistakes(GOOD, SOURCES) == []


@pytest.mark.parametrize("mode", ["0o644", "0o1777", "0o1204", "0o7777", "0"])
def test_octal_modes_pass(mode: str) -> None:
    assert find_mistakes(GOOD.replace('source = "motd"', f'source = "motd"\nmode = {mode}'), SOURCES) == []


@pytest.mark.parametrize(("mode", "flaws"), [("0o644", 0), ("644", 1)])
def test_mode_in_an_inline_table(mode: str, flaws: int) -> None:
    text = GOOD + f'file = [\n  {{path = "/etc/x", source = "motd", mode = {mode}}},\n]\n'
    assert [mistake.key for mistake in find_mistakes(text, SOURCES)] == ["variants.small.file.0.mode"] * flaws


def test_syntax_errors_have_a_line() -> None:
    (mistake,) = find_mistakes('description = "x"\nmethod = \n', {})
    assert (mistake.file, mistake.line) == ("template.toml", 2)


def test_all_mistakes_are_told_at_once() -> None:
    text = GOOD.replace("stop_timeout = 5", "stop_timeout = 0").replace('less = "to read"', "less = 1")
    assert [mistake.line for mistake in find_mistakes(text, SOURCES | {"hostname.j2": "\n{{ no }}"})] == [9, 12, 2]


def test_mistakes_of_a_file_name_its_line(root: Root) -> None:
    folder = put(root, "trial", sources=SOURCES | {"hostname.j2": "\n\n{{ jail.nam }}"})
    (mistake,) = recipe.validate(str(folder))
    assert mistake == Mistake("files/hostname.j2", 3, "jail.nam", mistake.what)
    with pytest.raises(JailmgrError, match=r"files/hostname.j2:3: jail.nam") as refused:
        recipe.load_template(str(folder))
    assert refused.value.code == "invalid"
    assert "template validate" in refused.value.hint


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"description = 1\n\xff", b"x" * (300 * 1024), b"a = " + b"[" * 5000])
def test_what_is_no_text(root: Root, raw: bytes) -> None:
    folder = put(root, "trial")
    (folder / "template.toml").write_bytes(raw)
    mistakes = recipe.validate(str(folder))
    assert mistakes[0].file == "template.toml"


def test_links_out_of_the_folder_are_not_followed(root: Root, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = put(root, "trial", sources={"hostname.j2": "x"})
    (folder / "files" / "motd").symlink_to(secret)
    assert [mistake.key for mistake in recipe.validate(str(folder))] == ["file.1.source"]
    (folder / "template.toml").unlink()
    (folder / "template.toml").symlink_to(secret)
    with pytest.raises(JailmgrError) as refused:
        recipe.validate(str(folder))
    assert refused.value.code == "missing"


def test_fifo_does_not_hang(root: Root) -> None:
    folder = put(root, "trial", sources={"hostname.j2": "x"})
    os.mkfifo(folder / "files" / "motd")
    assert [mistake.key for mistake in recipe.validate(str(folder))] == ["file.1.source"]


def test_missing_folder(root: Root) -> None:
    with pytest.raises(JailmgrError) as refused:
        recipe.validate(f"{root.etc}/nothing")
    assert refused.value.code == "missing"


def test_the_admins_template_comes_first(root: Root) -> None:
    folder = put(root, "debian")
    found = recipe.find_templates(root)
    assert found["debian"] == str(folder)
    assert found["busybox"] == str(TEMPLATES / "busybox")


def test_resolve(root: Root) -> None:
    put(root, "trial")
    build = recipe.resolve(root, "trial")
    assert (build.source, build.packages, build.recipe.stop_timeout) == ("trial/one", ["less"], 5)
    assert [file.path for file in build.create_files] == ["/etc/hostname"]
    small = recipe.resolve(root, "trial/two/small")
    assert (small.source, small.packages) == ("trial/two/small", ["nano"])
    assert (small.recipe.stop_signal, small.recipe.stop_timeout) == ("SIGPWR", 5)
    keys = {recipe.resolve(root, source).key for source in ("trial", "trial/one", "trial/two", "trial/two/small")}
    assert len(keys) == 3


def test_key_changes_with_a_file_and_with_the_configured_mirror(root: Root) -> None:
    folder = put(root, "trial")
    before = recipe.resolve(root, "trial").key
    (folder / "files" / "motd").write_text("other")
    changed = recipe.resolve(root, "trial").key
    Path(root.etc, "config.toml").write_text('[mirrors.x]\nurl = "http://mirror.example/x"\n')
    assert len({before, changed, recipe.resolve(root, "trial").key}) == 3


@pytest.mark.parametrize(
    ("source", "why", "hint"),
    [
        ("trail", "no template 'trail'", "Did you mean 'trial'?"),
        ("trial/on", "no release 'on'", "Did you mean 'one'?"),
        ("trial/one/smal", "no variant 'smal'", "Did you mean 'small'?"),
        ("../trial", "no template '..'", "template list"),
        ("trial/one/small/x", "no variant 'small/x'", "small"),
        ("", "no template ''", "template list"),
    ],
)
def test_near_misses(root: Root, source: str, why: str, hint: str) -> None:
    put(root, "trial")
    with pytest.raises(JailmgrError, match=why) as refused:
        recipe.resolve(root, source)
    assert refused.value.code == "missing"
    assert hint in refused.value.hint


def test_positions() -> None:
    text = """# [no]
a = "[x]" # b = 1
b.c = '''
[no]
d = 1
'''

[t."q.r"]
e = [
  1, # ]
  { f = 2 },
]
[[u]]
g = \"\"\"
\\\"\"\" [no] \"\"\"
[[u]]
g = 1
[u.v]
h = 1
"""
    tomli.loads(text)
    found = positions.find_keys(text)
    assert found == {
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 3,
        ("t",): 8,
        ("t", "q.r"): 8,
        ("t", "q.r", "e"): 9,
        ("u",): 13,
        ("u", 0): 13,
        ("u", 0, "g"): 14,
        ("u", 1): 16,
        ("u", 1, "g"): 17,
        ("u", 1, "v"): 18,
        ("u", 1, "v", "h"): 19,
    }
    assert positions.line_of(found, ("t", "q.r", "e", 1, "f")) == 9


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.text(max_size=20), max_size=6))
def test_positions_of_flat_keys(table: dict[str, str]) -> None:
    lines = [
        f'{key} = "' + "".join(f"\\U{ord(char):08x}" for char in value) + '" # x = [1' for key, value in table.items()
    ]
    assert tomli.loads("\n".join(lines)) == table
    assert positions.find_keys("\n".join(lines)) == {(key,): line for line, key in enumerate(table, 1)}


def test_distribution_is_the_keyrings(root: Root) -> None:
    put(root, "trial", GOOD.replace("x.gpg", "devuan-archive-keyring.gpg"))
    named = GOOD.replace('x.gpg"', 'x.gpg"\ndistribution = "ubuntu"')
    put(root, "named", named.replace("[packages]", '[mirror]\nurl = "http://m.example/ubuntu/"\n[packages]'))
    found = [recipe.resolve(root, name) for name in ("trial", "named", "debian")]
    assert [build.distribution for build in found] == ["devuan", "ubuntu", "debian"]
    assert found[1].own_mirrors.url == "http://m.example/ubuntu"
