"""Sizes and CPU shares, as people write them and as the kernel wants them. It imports little: `list` shows sizes."""

from __future__ import annotations

_SIZE = r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)\Z"
_FACTOR = {"": 1, "B": 1} | {
    f"{prefix}{tail}": base**power
    for power, prefix in enumerate("kMGTPE", 1)
    for tail, base in (("B", 1000), ("iB", 1024))
}
_FACTOR["KiB"] = _FACTOR.pop("kiB")
_BITS = {"": 1, "bit": 1} | {
    f"{prefix}{tail}": base**power
    for power, prefix in enumerate("kMGT", 1)
    for tail, base in (("bit", 1000), ("ibit", 1024))
}
_BITS["Kibit"] = _BITS.pop("kibit")
BITS_MIN, BITS_MAX = 8000, 10**12
"""Bits a second: at less than the least a full frame would take more than a second and a half."""
_ALLOWANCE = r"(\d+)ms/(\d+)ms\Z"


def parse_size(text: str) -> int:
    """Bytes of `512MiB`, `5GB`, `1.5GiB` or `1048576`; ValueError tells what was expected.

    Units are LXD's: kB MB GB TB PB EB (powers of 1000) and KiB MiB GiB TiB PiB EiB (of 1024).
    """
    import re

    match = re.match(_SIZE, text.strip(), re.ASCII)
    factor = _FACTOR.get(match[2]) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size (bytes, or a number with kB, MB, GB, KiB, MiB or GiB)")
    size = float(match[1]) * factor if "." in match[1] else int(match[1]) * factor
    if size > 2**62:
        raise ValueError(f"{text!r} is larger than any host")
    return int(size)


def format_size(size: int | None) -> str:
    """Bytes for a person: three digits or so and a binary unit; `-` for None."""
    if size is None:
        return "-"
    value, unit = float(size), "B"
    for step in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, step
    return f"{value:.0f}{unit}" if unit == "B" or value >= 100 else f"{value:.1f}{unit}"


def parse_cpus(text: str) -> dict[str, str]:
    """`--cpus` as configuration keys: `2` is `limits.cpu=2`, `1.5` is `limits.cpu.allowance=150ms/100ms`."""
    try:
        cpus = float(text)
    except ValueError:
        cpus = -1.0
    if not 0.01 <= cpus <= 4096:
        raise ValueError(f"{text!r} is not a number of CPUs (such as 2 or 1.5)")
    if cpus.is_integer():
        return {"limits.cpu": str(int(cpus))}
    return {"limits.cpu.allowance": f"{round(cpus * 100)}ms/100ms"}


def parse_allowance(text: str) -> tuple[int, int]:
    """Quota and period in microseconds of `limits.cpu.allowance` in its hard form (`25ms/100ms`).

    The kernel takes periods of 1 ms to 1 s and quotas from 1 ms (cpu.cfs_period_us, sched-bwc).
    """
    import re

    match = re.match(_ALLOWANCE, text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not an allowance (such as 150ms/100ms or 50%)")
    quota, period = int(match[1]) * 1000, int(match[2]) * 1000
    if not (1000 <= period <= 1_000_000 and quota >= 1000):
        raise ValueError(f"{text!r}: the period must be 1ms to 1000ms, the share at least 1ms")
    return quota, period


def parse_percent(text: str) -> int:
    """1 to 100 of `50%`: `limits.cpu.allowance` in its soft form, a weight under load."""
    if not (text.endswith("%") and text[:-1].isascii() and text[:-1].isdigit() and 1 <= int(text[:-1]) <= 100):
        raise ValueError(f"{text!r} is not a share from 1% to 100%")
    return int(text[:-1])


def parse_rate(text: str) -> tuple[int | None, int | None]:
    """Bytes and operations a second of LXD's `limits.read` and its like: `20MiB` or `500iops`; one of them is None."""
    number = text.removesuffix("iops")
    if number != text:
        if number.isascii() and number.isdigit() and 1 <= int(number) < 2**31:
            return None, int(number)
    elif (size := parse_size(text)) >= 1:
        return size, None
    raise ValueError(f"{text!r} is not a rate (such as 20MiB, for a second, or 500iops)")


def parse_bit_rate(text: str) -> int:
    """Bits a second of LXD's `limits.ingress` and its like: `10Mbit`, `1.5Gbit`, `64Kibit` or `8000`; else ValueError.

    Units are LXD's: bit kbit Mbit Gbit Tbit (powers of 1000) and Kibit Mibit Gibit Tibit (of 1024).
    """
    import re

    match = re.match(_SIZE, text.strip(), re.ASCII)
    factor = _BITS.get(match[2]) if match else None
    if match is None or factor is None or len(match[1]) > 20:
        raise ValueError(f"{text!r} is not a rate (bits a second, or a number with kbit, Mbit, Gbit, Kibit or Mibit)")
    rate = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if not BITS_MIN <= rate <= BITS_MAX:
        raise ValueError(f"{text!r} is not between 8kbit and 1Tbit a second")
    return rate
