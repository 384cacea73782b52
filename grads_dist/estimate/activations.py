"""What a forward pass keeps for the backward pass, found by running the model on tensors without data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from grads_dist.model.adapter import inject_adapter
from grads_dist.model.anatomy import Anatomy, dissect
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import disable_dropout, load_config, quantization_of
from grads_dist.stats.capture import captured, tap_output

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Activations:
    """Bytes that one row of `length` tokens keeps between its forward and its backward pass.

    Args:
        length: tokens of the row.
        layers: all decoder layers together.
        largest_layer: the largest of them: what exists at a time under gradient checkpointing.
        rest: embedding, last norm and what else lies outside the layers.
        capture: what of all that is kept for the statistics alone.
        boundary: input of every layer, which checkpointing keeps.
        exact: whether they were counted; else they are a rule of thumb.
    """

    length: int
    layers: float
    largest_layer: float
    rest: float
    capture: float
    boundary: float
    exact: bool = True

    def bytes_of(self, padded_tokens: float, checkpointing: bool) -> float:
        """Of a micro-batch of that many tokens in rows of this length."""
        rows = padded_tokens / self.length
        if checkpointing:
            return rows * (self.boundary + self.largest_layer + self.rest)
        return rows * (self.layers + self.rest)


class _Counter:
    """Adds up the storages that autograd saves, each once, by the layer whose forward pass runs.

    Args:
        parameters: what is there anyway.
        mask: shape of tensors that a pass with data has none of.
    """

    def __init__(self, parameters: Iterable[Tensor], mask: tuple[int, ...] | None) -> None:
        self._mask = mask
        self._seen = {p.untyped_storage()._cdata for p in parameters}
        self._kept: list[Tensor] = []  # A freed storage's address would come again.
        self.layer = -1
        self.bytes: dict[int, int] = {}

    def save(self, tensor: Tensor) -> Tensor:
        """Count a tensor as autograd packs it."""
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) == self._mask:
            return tensor
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes[self.layer] = self.bytes.get(self.layer, 0) + storage.nbytes()
        return tensor


def count_activations(
    config: ModelConfig, dtype: torch.dtype, read: frozenset[str], training: bool, length: int
) -> Activations:
    """Run a row of `length` tokens through the model on tensors without data and count what autograd saves.

    Args:
        config: which model.
        dtype: type of its weights.
        read: qualified names of the parameters whose layers are read.
        training: whether the weights are trained; frozen ones keep no inputs for their gradients.
        length: tokens of the row.

    A model that does not run without data, as some mixtures of experts, gets a rule of thumb.
    """
    try:
        plain = _run(config, dtype, frozenset(), training, length)
        whole = _run(config, dtype, read, training, length) if read else plain
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        log.info("activations are a rule of thumb: %s", str(error).partition("\n")[0])
        return _rule_of_thumb(config, dtype, length)
    return whole if whole is plain else _with_capture(whole, plain)


def _with_capture(whole: Activations, plain: Activations) -> Activations:
    capture = whole.layers + whole.rest - plain.layers - plain.rest
    return Activations(**{**vars(whole), "capture": max(0.0, capture)})


def _run(
    config: ModelConfig, dtype: torch.dtype, read: frozenset[str], training: bool, length: int
) -> Activations:
    with FakeTensorMode():
        model = _build(config, dtype)
        if not training:
            model.requires_grad_(False)
        anatomy = dissect(model)
        counter = _Counter([*model.parameters(), *model.buffers()], _needless_mask(model, length))
        undo = [*_watch_layers(anatomy, counter), *_watch_modules(model, read)]
        ids = torch.zeros(1, length, dtype=torch.int64)
        positions = torch.arange(length)[None]
        with torch.autograd.graph.saved_tensors_hooks(counter.save, lambda tensor: tensor):
            # A mask of ones would be looked at, to be dropped.
            output = anatomy.body(input_ids=ids, position_ids=positions, use_cache=False)
        hidden = output.last_hidden_state
        for remove in undo:
            remove()
        layers = [size for layer, size in counter.bytes.items() if layer >= 0]
        boundary = len(anatomy.layers) * hidden.numel() * hidden.element_size()
    return Activations(
        length=length,
        layers=sum(layers),
        largest_layer=max(layers, default=0),
        rest=counter.bytes.get(-1, 0) + hidden.numel() * hidden.element_size(),
        capture=0.0,
        boundary=boundary if layers else 0.0,
    )


def _needless_mask(model: PreTrainedModel, length: int) -> tuple[int, ...] | None:
    """The shape of the causal mask that transformers makes for tensors without data.

    With data it finds that there is nothing to mask but the future, which attention kernels know by
    themselves, unless a window slides.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if model.config._attn_implementation == "eager" or (window and window < length):
        return None
    return (1, 1, length, length)


def _build(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    loaded = load_config(config)
    if quantization_of(loaded) is not None:
        raise ValueError("the model is quantised")
    model = AutoModelForCausalLM.from_config(
        loaded,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    if config.adapter is not None:
        inject_adapter(model, config.adapter)
    disable_dropout(model)
    return model


def _watch_layers(anatomy: Anatomy, counter: _Counter) -> list[Callable[[], None]]:
    """Tell the counter which layer runs."""

    def entering(number: int) -> Callable[..., None]:
        def enter(*_: object) -> None:
            counter.layer = number

        return enter

    undo: list[Callable[[], None]] = []
    for number, name in enumerate(anatomy.layers):
        layer = anatomy.model.get_submodule(name)
        undo.append(layer.register_forward_pre_hook(entering(number)).remove)
        undo.append(layer.register_forward_hook(entering(-1)).remove)
    return undo


def _watch_modules(model: nn.Module, read: frozenset[str]) -> list[Callable[[], None]]:
    """Keep the inputs of the layers that are read, as the recorder does."""

    def tap(layer_input: Tensor, output: Tensor) -> Tensor | None:
        # Routers return a tuple; what is read inside them is small.
        return captured(layer_input, output, _nowhere) if isinstance(output, Tensor) else None

    owners = sorted({name.rpartition(".")[0] for name in read})
    return [tap_output(model.get_submodule(owner), tap) for owner in owners]


def _nowhere(layer_input: Tensor, gradient: Tensor) -> None:
    """Nothing is read: there is no backward pass."""


def _rule_of_thumb(config: ModelConfig, dtype: torch.dtype, length: int) -> Activations:
    """34 bytes a token, layer and dimension of the hidden state in 16 bits (Korthikanti et al. 2022)."""
    text = load_config(config).get_text_config()
    hidden = length * text.hidden_size * dtype.itemsize
    layer = 17.0 * hidden
    depth = text.num_hidden_layers
    return Activations(length, depth * layer, layer, 2.0 * hidden, 0.0, float(depth * hidden), exact=False)
