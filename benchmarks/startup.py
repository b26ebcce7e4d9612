"""How long the library takes to start, in fresh processes, medians of several runs.

Bars: `import secateur` under 0.5 s beyond importing torch, `secateur --help` under 1 s. `first use` is what
comes on top when the interface is touched for the first time (`secateur.plan`).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 7
CASES = {
    "python": "pass",
    "torch": "import torch",
    "torch + secateur": "import torch, secateur",
    "torch + first use": "import torch, secateur; secateur.plan",
    "secateur --help": "import sys; sys.argv = ['secateur', '--help']; from secateur.cli import main; main()",
}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):  # interleaved, so that drift hits all alike
        for name, code in CASES.items():
            times[name].append(seconds(code))
    found = {name: statistics.median(values) for name, values in times.items()}
    for name, value in found.items():
        print(f"{name:20s} {value:6.3f} s")
    beyond, use = found["torch + secateur"] - found["torch"], found["torch + first use"] - found["torch"]
    print(f"import secateur beyond torch: {beyond:.3f} s, bar 0.5: {'met' if beyond < 0.5 else 'MISSED'}")
    print(f"with its first use:           {use:.3f} s, bar 0.5: {'met' if use < 0.5 else 'MISSED'}")
    print(f"secateur --help:              {found['secateur --help']:.3f} s, bar 1: ", end="")
    print("met" if found["secateur --help"] < 1 else "MISSED")


if __name__ == "__main__":
    main()
