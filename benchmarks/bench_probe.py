"""What a probed epoch costs against a plain DeepSpeed epoch, and what other ways to the same numbers cost.

    python benchmarks/bench_probe.py --memory                     a random 5M-parameter Llama, synthetic rows
    python benchmarks/bench_probe.py --model DIR --data x.jsonl   your own
    python benchmarks/bench_probe.py --smoke                      a few seconds, to see that it works

All variants run on every micro-batch, in an order drawn anew for each, in one process; ratios are to `plain`
on the same micro-batch. Before anything is timed, the statistics of all variants on the first micro-batch are
compared. The learning rate is 0, so that all variants stay at the same weights; an update costs the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from trial import Trial, make_parser, run
from trial import parse as parse_trial
from variants import REFERENCE, VARIANTS

TRIAL = Trial("bench_probe", __file__, VARIANTS, REFERENCE, facts={})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the trial that the command line asks for."""
    run(TRIAL, parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return parse_trial(TRIAL, make_parser(TRIAL, __doc__), argv)


if __name__ == "__main__":
    main()
