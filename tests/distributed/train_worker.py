"""What the ranks of test_training.py do: train on the same rows in several ways, in one process group.

    torchrun --nproc-per-node 2 tests/distributed/train_worker.py jobs.json

Each entry of the JSON list names a way, the program's arguments and a file for what came out: each row's loss
when it was trained on, and the final weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grads_dist.commands import prepare
from grads_dist.config import Config
from grads_dist.data.store import TokenStore
from grads_dist.parsing import build, make_parser, parse
from grads_dist.probe import run as run_module
from grads_dist.probe.passes import Work, train_pass
from grads_dist.probe.plan import train_plan
from grads_dist.probe.session import Session
from grads_dist.probe.zero import join_ranks
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks
from grads_dist.table.shards import ScoreShards

Losses = dict[int, float]


def with_statistics(arguments: list[str], ranks: Ranks) -> tuple[nn.Module, Losses]:
    """The program's own probe; the losses are in its table."""
    sessions = []

    class Kept(Session):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            sessions.append(self)

    with mock.patch.object(run_module, "Session", Kept):
        prepare(["probe", "--overwrite", *arguments])()
    return sessions[0].model.causal_lm, {}


def without_statistics(arguments: list[str], ranks: Ranks) -> tuple[nn.Module, Losses]:
    """The same session, recording nothing."""
    config = config_of(arguments)
    store = open_store(config)
    session = Session(config, ranks)
    losses: Losses = {}
    train = session.train_micro_batch

    def spy(batch, last_of_step, record):
        found = train(batch, last_of_step, record)
        losses.update(zip(batch.rows.tolist(), session.model.head_result.losses.tolist(), strict=False))
        return found

    work = Work(session, store, config.probe, ScoreShards(Path("unused"), store, session.targets), None)
    with mock.patch.object(session, "train_micro_batch", spy):
        for epoch in range(config.probe.epochs):
            plan = plan_of(config, store, epoch)
            train_pass(work, plan, range(plan.num_groups), record=False)
    return session.model.causal_lm, losses


def plain_deepspeed(arguments: list[str], ranks: Ranks) -> tuple[nn.Module, Losses]:
    """DeepSpeed around the transformers model and its own logits; one micro-batch a rank and step."""
    config = config_of(arguments)
    store, losses = open_store(config), {}
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    content = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
    content["optimizer"]["params"] = {**adam(config), "torch_adam": True}
    content |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": config.probe.max_grad_norm}
    join_ranks(ranks)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=content)
    for rows in steps_of(config, store):
        own = rows[ranks.rank :: ranks.world_size]
        per_row = row_losses(engine, store, own)
        # DeepSpeed averages over ranks.
        weights = torch.from_numpy(weights_of(config, store, rows)[ranks.rank :: ranks.world_size])
        engine.backward(ranks.world_size * (per_row * weights).sum())
        engine.step()
        losses.update(zip(own.tolist(), per_row.tolist(), strict=True))
    return model, losses


def plain_torch(arguments: list[str], ranks: Ranks) -> tuple[nn.Module, Losses]:
    """Nothing but torch: AdamW, the whole step as one batch, on one rank."""
    config = config_of(arguments)
    store, losses = open_store(config), {}
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), **adam(config))
    for rows in steps_of(config, store):
        per_row = row_losses(model, store, rows)
        (per_row * torch.from_numpy(weights_of(config, store, rows))).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.probe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.update(zip(rows.tolist(), per_row.tolist(), strict=True))
    return model, losses


def config_of(arguments: list[str]) -> Config:
    parser = make_parser("train_worker", Config, "")
    return build(parser, parse(parser, arguments, Config), Config)


def adam(config: Config) -> dict:
    params = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))["optimizer"]["params"]
    return {
        "lr": config.probe.learning_rate,
        "betas": [0.9, 0.999],
        "eps": params["eps"],
        "weight_decay": 0.0,
    }


def open_store(config: Config) -> TokenStore:
    (folder,) = (Path(config.data.cache_dir) / "tokens").iterdir()
    return TokenStore.open(folder)


def plan_of(config: Config, store: TokenStore, epoch: int):
    probe = config.probe
    return train_plan(store.num_tokens, probe.global_batch, probe.batch_tokens, probe.seed, epoch)


def steps_of(config: Config, store: TokenStore) -> Iterator[np.ndarray]:
    """The rows of every optimizer step; with a warmup, of those before the weights are frozen."""
    for epoch in range(config.probe.epochs):
        plan = plan_of(config, store, epoch)
        for step in range(round(plan.num_groups * (config.probe.warmup or 1))):
            yield plan.rows_of(step)


def weights_of(config: Config, store: TokenStore, rows: np.ndarray) -> np.ndarray:
    """Weight of each row's mean loss in the objective, float32."""
    labels = np.array([store.loss_mask(int(i)).sum() for i in rows], dtype=np.float64)
    share = (
        labels / labels.sum() if config.probe.objective == "token_mean" else np.full(len(rows), 1 / len(rows))
    )
    return share.astype(np.float32)


def row_losses(model: nn.Module, store: TokenStore, rows: np.ndarray) -> Tensor:
    """Mean cross-entropy of each row over its label tokens, from one padded batch."""
    tokens = [torch.from_numpy(store.tokens(int(i)).astype(np.int64)) for i in rows]
    masks = [torch.from_numpy(store.loss_mask(int(i)).copy()) for i in rows]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=0)
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.stack(
        [
            nn.functional.cross_entropy(logits[s, : len(mask) - 1][mask[1:]], ids[s, 1 : len(mask)][mask[1:]])
            for s, mask in enumerate(masks)
        ]
    )


WAYS = {
    "with": with_statistics,
    "without": without_statistics,
    "deepspeed": plain_deepspeed,
    "torch": plain_torch,
}


def save(model: nn.Module, losses: Losses, path: Path, ranks: Ranks) -> None:
    gathered = {row: loss for part in ranks.gather(losses) for row, loss in part.items()}
    absent = [p for p in model.parameters() if hasattr(p, "ds_id") and p.ds_status.name == "NOT_AVAILABLE"]
    with deepspeed.zero.GatheredParameters(absent, enabled=bool(absent)):
        weights = {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}
    if ranks.is_main:
        rows = sorted(gathered)
        np.savez(path, loss=np.array([gathered[row] for row in rows], np.float32), **weights)


def main() -> None:
    ranks = Ranks.start(detect())
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        model, losses = WAYS[job["way"]](job["arguments"], ranks)
        save(model, losses, Path(job["output"]), ranks)
    ranks.close()


if __name__ == "__main__":
    main()
