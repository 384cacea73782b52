"""Saves the probed model as transformers does, gathered to rank 0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grads_dist.config import Config
from grads_dist.data.tokenizer import TokenizerSource, find_template, load_tokenizer
from grads_dist.model.load import load_config
from grads_dist.probe.session import Session
from grads_dist.runtime.rundir import atomic_folder

log = logging.getLogger(__name__)


def save_model(session: Session, config: Config, folder: Path) -> None:
    """Write the present weights, the model's own configuration and the tokenizer to `folder`.

    The folder appears when it is complete. The weights are in the type they are probed in; what the probe
    changed in the configuration (dropout) is as before. Of a model with an adapter the
    adapter is saved. Collective: ZeRO-3 gathers one weight at a time, and rank 0 holds them all.
    """
    model = session.model.causal_lm
    state = whole_weights(model, keep=session.ranks.is_main)
    session.ranks.on_main(lambda: _write(model, state, config, folder))


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """All weights and persistent buffers by name, on the CPU where `keep` is set, else none. Collective."""
    found: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with _gathered(value):
            if keep and id(value) not in copies:
                copies[id(value)] = value.detach().to("cpu", copy=True)
        if keep:
            # Names that share a weight share the copy, and the file holds it once.
            found[name] = copies[id(value)]
    return found


def _gathered(value: Tensor) -> Any:
    """Make a weight that ZeRO-3 shards whole inside."""
    if not hasattr(value, "ds_id"):
        return torch.no_grad()
    import deepspeed

    return deepspeed.zero.GatheredParameters([value])


def _write(model: Any, state: dict[str, Tensor], config: Config, folder: Path) -> None:
    source = config.model
    tokenizer = load_tokenizer(
        TokenizerSource(str(source.name_or_path), source.revision, source.trust_remote_code)
    )
    tokenizer.chat_template = find_template(tokenizer, config.data.chat_template)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        if source.adapter is None:
            original = load_config(source)
            original.dtype = model.dtype
            original.architectures = [type(model).__name__]
            original.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    log.info("probed model saved: %s", folder)
