"""What the ranks of test_invariance.py do: probe once for each entry of a JSON list, in one process group.

    torchrun --nproc-per-node 2 tests/distributed/probe_worker.py jobs.json

An entry holds the program's arguments; the memory for logits in bytes (null: as configured, in MiB, more than
all logits of a tiny model); and a file for the names of the weights that are whole on rank 0 at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

from grads_dist.commands import prepare
from grads_dist.model.probed import ProbedModel
from grads_dist.probe import session
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks


def probe(arguments: list[str], head_chunk_bytes: int | None) -> ProbedModel:
    """Probe; returns the model as the probe leaves it."""
    models = []

    def model(anatomy, recorder, configured_bytes):
        models.append(ProbedModel(anatomy, recorder, head_chunk_bytes or configured_bytes))
        return models[-1]

    with mock.patch.object(session, "ProbedModel", model):
        prepare(["probe", "--overwrite", *arguments])()
    return models[-1]


def whole_weights(model: ProbedModel) -> list[str]:
    """Weights that ZeRO-3 shards and that are whole on this rank all the same."""
    weights = model.causal_lm.named_parameters()
    return [name for name, p in weights if hasattr(p, "ds_status") and p.ds_status.name != "NOT_AVAILABLE"]


def main() -> None:
    ranks = Ranks.start(detect())
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        model = probe(job["arguments"], job.get("head_chunk_bytes"))
        whole = whole_weights(model)
        if ranks.is_main and "whole_weights" in job:
            Path(job["whole_weights"]).write_text(json.dumps(whole), encoding="utf-8")
    ranks.close()


if __name__ == "__main__":
    main()
