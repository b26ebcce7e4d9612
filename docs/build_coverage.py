"""Write docs/coverage.md: every network of the list pruned, cut and compared.

python docs/build_coverage.py

Minutes long. Results are kept in build/coverage.json as they come, so that a stopped run goes on where it was; they are
dropped when the engine or the list of networks has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

# Read when torch is imported, in this process and in its children.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "networks"))

import torch
from build import table
from covering import MOSTLY_FROZEN, SHARE, TOLERANCE, Verdict, cover

from networks import NETWORKS, available, use_networks

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "coverage.md"
CACHE = ROOT / "build" / "coverage.json"
DECIDING = (
    "src/secateur/structure",
    "src/secateur/shrink/cut.py",
    "src/secateur/shrink/reference.py",
    "tests/networks",
)
PROCESSES = 2
FAMILIES = ("hand-written", "torchvision", "timm", "transformers", "diffusers")

Row = dict[str, Any]


# --- results --------------------------------------------------------------------------------------


def sources() -> str:
    """A digest of all files that decide a result."""
    digest = hashlib.sha256(torch.__version__.encode())
    for place in DECIDING:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def kept_results(digest: str) -> dict[str, Row]:
    if not CACHE.exists():
        return {}
    cache = json.loads(CACHE.read_text(encoding="utf-8"))
    return cache["results"] if cache["sources"] == digest else {}


def keep(results: dict[str, Row], digest: str) -> None:
    CACHE.parent.mkdir(exist_ok=True)
    new = CACHE.with_suffix(".new")
    new.write_text(json.dumps({"sources": digest, "results": results}), encoding="utf-8")
    new.replace(CACHE)


def prepare() -> None:
    """Makes a process ready, so that no network's seconds are those of imports."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cover(NETWORKS["glu_mlp"])


def covered(name: str) -> Row:
    """One network's result, in one of the processes."""
    return asdict(cover(NETWORKS[name]))


def all_results() -> list[Row]:
    digest = sources()
    results = kept_results(digest)
    missing = [name for name in NETWORKS if name not in results]
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), prepare) as pool:
        for future in as_completed([pool.submit(covered, name) for name in missing]):
            row = future.result()
            results[row["network"]] = row
            keep(results, digest)
            print(f"{len(results):3}/{len(NETWORKS)} {row['network']}: {row['verdict']} {row['reason']}", flush=True)
    if sources() != digest:
        sys.exit(
            "the engine or the list has changed during the run, so the results are of several versions: run it again"
        )
    return [results[name] for name in NETWORKS]


# --- the page -------------------------------------------------------------------------------------


def totals(rows: list[Row]) -> list[str]:
    columns = ["family", "networks", *(verdict.value for verdict in Verdict), "groups", "parameters left (median)"]
    columns += ["largest difference", "seconds (median)"]
    lines = [total(name, [row for row in rows if row["family"] == name]) for name in FAMILIES]
    return table(columns, [*lines, total("all", rows)])


def total(name: str, rows: list[Row]) -> list[Any]:
    counts = [sum(row["verdict"] == verdict for row in rows) for verdict in Verdict]
    good = [row for row in rows if row["verdict"] == Verdict.RIGHT]
    if not good:
        return [name, len(rows), *counts, 0, "", "", ""]
    groups = sum(sum(row["sites"].values()) for row in good)
    left, seconds = (median(row[key] for row in good) for key in ("left", "seconds"))
    return [name, len(rows), *counts, groups, f"{left:.0%}", f"{max(row['gap'] for row in good):.1e}", f"{seconds:.2f}"]


def not_right(rows: list[Row]) -> list[str]:
    lines = [[row["network"], row["verdict"], row["reason"]] for row in rows if row["verdict"] != Verdict.RIGHT]
    if not lines:
        return ["No network is refused or wrong.", ""]
    return ["## Refused or wrong", "", *table(["network", "verdict", "reason"], lines)]


def mostly_frozen(rows: list[Row]) -> list[str]:
    lines = [
        [r["network"], f"{r['left']:.0%}", MOSTLY_FROZEN[r["network"]]] for r in rows if r["network"] in MOSTLY_FROZEN
    ]
    return ["## Right, and hardly smaller", "", *table(["network", "parameters left", "why"], lines)]


def reasons(rows: list[Row]) -> list[str]:
    axes, networks = Counter[str](), Counter[str]()
    for row in rows:
        axes.update(row["frozen"])
        networks.update(row["frozen"].keys())
    lines = [[reason, count, networks[reason]] for reason, count in axes.most_common(12)]
    return ["## What cannot be cut", "", *table(["reason (operator)", "axes", "in networks"], lines)]


def network(row: Row) -> list[Any]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row["sites"].items())
    commonest = next(iter(row["frozen"].items()), ("", 0))
    frozen = f"{sum(row['frozen'].values())}; {commonest[1]}: {commonest[0]}" if commonest[1] else ""
    shown = [
        sum(row["sites"].values()),
        kinds,
        f"{row['left']:.0%}",
        f"{row['gap']:.0e}" if row["gap"] else "0",
        frozen,
        f"{row['seconds']:.2f}",
    ]
    return [row["network"], *(shown if row["verdict"] == Verdict.RIGHT else [row["verdict"], *[""] * 5])]


def family(name: str, rows: list[Row]) -> list[str]:
    columns = [
        "network",
        "groups",
        "kinds",
        "parameters left",
        "difference",
        "frozen axes; commonest reason",
        "seconds",
    ]
    return [f"## {name}", "", *table(columns, [network(row) for row in rows if row["family"] == name])]


def environment() -> str:
    torchvision = use_networks()
    import timm  # lies beside torchvision, which has just been found

    found = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    found |= {name: version(name) for name in ("transformers", "diffusers")}
    return ", ".join(f"{name} {value}" for name, value in found.items()) + "; CPU, float32, one thread"


def page(rows: list[Row]) -> str:
    unknown = sorted({operator for row in rows for operator in row["unknown"]})
    lines = ["# Coverage", "", "Written by `make coverage`; do not edit.", ""]
    lines += [
        "Every network of the tests' list, small and with random weights. Of every free group of units,",
        f"{SHARE:.0%} go, chosen at random, in all groups at once. *Right*: the cut network gives what the dense one",
        "gives with the removed units silenced, the difference is at most",
        f"{TOLERANCE:.0e} of the largest output (of 1, where that is larger), it has exactly as many parameters as",
        "promised, and the dense network's output is another one. *Refused*: an error says why not. *Parameters left*",
        "is what random pruning of everything leaves, no recommendation. *Seconds* are those of the analysis alone.",
        "",
        f"Made with {environment()}.",
        "",
        *totals(rows),
        f"Operators without a rule: {', '.join(unknown) or 'none'}.",
        "",
    ]
    lines += not_right(rows) + mostly_frozen(rows) + reasons(rows)
    for name in FAMILIES:
        lines += family(name, rows)
    return "\n".join(lines)


def main() -> None:
    absent = sorted({one.family for one in NETWORKS.values() if not available(one)})
    if absent:
        sys.exit(f"not installed: {', '.join(absent)}; run make networks")
    PAGE.write_text(page(all_results()), encoding="utf-8")


if __name__ == "__main__":
    main()
