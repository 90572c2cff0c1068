"""What does adaptlr add to an optimizer step, in host time and in device time, on this machine?

Writes ``overhead_<device>.md`` and ``.csv``, to be committed under ``benchmarks/results``. Needs
adaptlr and torch only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from adaptlr.bench import DEFAULT_ROUNDS, measure

RESULTS = Path(__file__).parents[1] / "results"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; auto: GPU if any")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="commit of the sources, outside of a clone")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    report = measure(torch.device(name), arguments.rounds, commit=arguments.commit)
    stem = f"overhead_{report.facts.slug()}"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / f"{stem}.md").write_text(report.markdown())
    (arguments.output_dir / f"{stem}.csv").write_text(report.csv())
    print(report.markdown())


if __name__ == "__main__":
    main()
