"""From samples to a table of medians and a JSON file."""

from __future__ import annotations

import json
import os
import time
from statistics import median
from typing import NamedTuple


class Row(NamedTuple):
    """One thing measured. `goal` bounds `jailmgr` over `lxc` where `bounds` is "ratio", else the value itself."""

    what: str
    unit: str
    jailmgr: list[float]
    lxc: list[float]
    goal: float | None = None
    bounds: str = "ratio"

    @property
    def ratio(self) -> float | None:
        return median(self.jailmgr) / median(self.lxc) if self.jailmgr and self.lxc else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        found = self.ratio if self.bounds == "ratio" else median(self.jailmgr)
        return None if self.goal is None or found is None else found <= self.goal


def table(rows: list[Row]) -> str:
    """Medians, side by side."""
    lines = [("", "jailmgr", "lxc", "ratio", "goal", "")]
    for row in rows:
        goal = "" if row.goal is None else f"<= {row.goal:g}" + ("x" if row.bounds == "ratio" else f" {row.unit}")
        met = {None: "", True: "met", False: "MISSED"}[row.met]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append((row.what, _value(row.jailmgr, row.unit), _value(row.lxc, row.unit), ratio, goal, met))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([first, *(cell.strip().rjust(len(cell)) for cell in rest)]).rstrip()


def _value(samples: list[float], unit: str) -> str:
    return f"{median(samples):.1f} {unit}" if samples else "-"


def write(rows: list[Row], about: dict[str, object], folder: str) -> str:
    """Everything measured as JSON, in a file named after the time; gives its path."""
    kernel = os.uname()
    document = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": {"kernel": kernel.release, "machine": kernel.machine, "cpus": os.cpu_count()},
        **about,
        "rows": [
            row._asdict()
            | {
                "median": {
                    "jailmgr": median(row.jailmgr) if row.jailmgr else None,
                    "lxc": median(row.lxc) if row.lxc else None,
                },
                "ratio": row.ratio,
                "met": row.met,
            }
            for row in rows
        ],
    }
    os.makedirs(folder, exist_ok=True)
    path = f"{folder}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
    return path
