"""What zeros, patterns, cuts and bfloat16 bring on this machine: one layer 1024 -> 4096, ratios to dense float32.

The same measurement is part of `secateur bench` and of every report.
"""

from __future__ import annotations

from secateur.measure import probe_machine


def main() -> None:
    facts = probe_machine(seconds=8.0)
    print(f"{facts.cpu}, {facts.threads} threads, torch {facts.torch}")
    for row in facts.rows:
        print(f"{row.layout.value:26s} batch {row.batch:3d} {row.median:8.3f} ms  {row.speedup:6.2f}x dense float32")
    for sentence in facts.sentences:
        print("-", sentence)


if __name__ == "__main__":
    main()
