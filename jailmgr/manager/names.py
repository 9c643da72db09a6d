"""Made-up names for jails that are given none: an adjective and a noun."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jailmgr.manager.host import Manager

ADJECTIVES = [
    "able", "amber", "brave", "bright", "brisk", "calm", "clear", "clever", "cosy", "crisp", "deft", "eager",
    "early", "fair", "fleet", "fond", "frank", "fresh", "gentle", "glad", "golden", "grand", "happy", "hardy",
    "honest", "humble", "jolly", "keen", "kind", "lively", "loyal", "lucky", "merry", "mild", "modest", "neat",
    "noble", "patient", "plain", "polite", "proud", "quick", "quiet", "ready", "rosy", "sharp", "silent", "silver",
    "simple", "sleek", "smart", "snug", "sober", "solid", "spry", "steady", "sturdy", "sunny", "swift", "tidy",
    "vivid", "warm", "wise", "witty",
]  # fmt: skip
NOUNS = [
    "alder", "badger", "beech", "birch", "bison", "brook", "cedar", "cliff", "coral", "crane", "creek", "curlew",
    "dale", "deer", "dove", "dune", "eagle", "elm", "falcon", "fern", "finch", "fjord", "fox", "grouse", "gull",
    "hare", "hawk", "hazel", "heron", "hill", "ibex", "iris", "jay", "kestrel", "lake", "lark", "larch", "lily",
    "linden", "lynx", "maple", "marten", "meadow", "moose", "moss", "oak", "osprey", "otter", "owl", "pine",
    "plover", "pond", "quail", "raven", "reed", "river", "robin", "rook", "rowan", "sage", "seal", "shore", "snipe",
    "sparrow", "spruce", "stoat", "stork", "swan", "swift", "tern", "thrush", "vale", "willow", "wren", "yew",
]  # fmt: skip


def make_up_name(m: Manager, tenant: str) -> str:
    """A name the tenant has no jail of; with a number where chance didn't find one."""
    for tries in range(200):
        name = f"{secrets.choice(ADJECTIVES)}-{secrets.choice(NOUNS)}"
        if tries > 20:
            name += f"-{secrets.randbelow(10 ** (tries // 20))}"
        if not m.store.name_taken(tenant, name):
            return name
    return f"jail-{secrets.token_hex(8)}"
