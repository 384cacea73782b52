"""Shows rows as the model will see them, with the tokens that carry loss marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.detect import resolve_formats
from grads_dist.data.encode import EncodedRow, Encoding, RowEncoder
from grads_dist.data.formats import RowFormat, read_id
from grads_dist.data.rows import Broken, RowError
from grads_dist.data.tokenizer import TokenizerSource, load_tokenizer
from grads_dist.errors import ConfigError, shown

if TYPE_CHECKING:
    from grads_dist.config import Config

OPEN, CLOSE = "⟦", "⟧"
_MOST_ROWS = 1000
_MOST_CHARACTERS = 4000


def inspect(config: Config, count: int) -> str:
    """Text that shows the first `count` usable rows: tokens that carry loss between ⟦ and ⟧.

    Rows that cannot be used on the way there are listed with their reasons; after 1000 rows it stops. Rows
    take the same way as in `run`: cut at the model's context, refused beyond its vocabulary. Raises what
    `tokenize` raises, and ConfigError when the model that is named has no configuration.
    """
    data, vocab_size = _as_run(config)
    corpus = Corpus.open(data)
    source = TokenizerSource(
        config.model.name_or_path or "", config.model.revision, config.model.trust_remote_code
    )
    encoding = Encoding(data, tuple(resolve_formats(data, corpus)), source, vocab_size)
    encoder = RowEncoder(encoding)
    tokenizer = _tokenizer_to_show(encoder, source)
    samples: list[str] = []
    rejected: list[tuple[int, RowError]] = []
    for index, row, row_format in _first_rows(corpus, encoding):
        if len(samples) == count:
            break
        try:
            if isinstance(row, Broken):
                raise RowError("broken row", row.reason)
            encoded = encoder.encode(row, row_format)
            samples.append(_sample(index, read_id(row, data, index), encoded, tokenizer))
        except RowError as error:
            rejected.append((index, error))
    head = f"{corpus.num_rows} rows of {encoding.kinds}; loss on {encoder.mask}, marked {OPEN}so{CLOSE}"
    return "\n\n".join([head, *samples, *_rejections(rejected, len(samples))]) + "\n"


def _first_rows(
    corpus: Corpus, encoding: Encoding
) -> Iterator[tuple[int, dict[str, Any] | Broken, RowFormat]]:
    for part, row_format in enumerate(encoding.formats):
        low, high = corpus.part_range(part, 0, _MOST_ROWS)
        for index, row in corpus.iter_rows(low, max(low, high)):
            yield index, row, row_format


def _as_run(config: Config) -> tuple[DataConfig, int | None]:
    """The data settings within the model's limits, and its vocabulary size; as they are without a model."""
    if not config.model.name_or_path:
        return config.data, None
    from grads_dist.model.context import within_context
    from grads_dist.model.load import load_text_config

    text_config = load_text_config(config.model)
    return within_context(config.data, text_config), text_config.vocab_size


def _tokenizer_to_show(encoder: RowEncoder, source: TokenizerSource) -> Any:
    """Rows of token ids need no tokenizer; with one they can be read."""
    if encoder.tokenizer is not None:
        return encoder.tokenizer
    try:
        return load_tokenizer(source)
    except ConfigError:
        return None


def _sample(index: int, row_id: str, row: EncodedRow, tokenizer: Any) -> str:
    cut = ", cut at max_length" if row.is_truncated else ""
    head = f"row {index}, id {row_id!r}: {len(row.tokens)} tokens, {int(row.loss.sum())} carry loss{cut}"
    return f"--- {head}\n{_marked(row, tokenizer)}"


def _marked(row: EncodedRow, tokenizer: Any) -> str:
    runs = groupby(zip(row.tokens.tolist(), row.loss.tolist(), strict=True), key=lambda token: token[1])
    text = ""
    for carries_loss, run in runs:
        shown = _decode([token for token, _ in run], tokenizer)
        text += f"{OPEN}{shown}{CLOSE}" if carries_loss else shown
        if len(text) > _MOST_CHARACTERS:
            return f"{text[:_MOST_CHARACTERS]} ... (the rest is not shown)"
    return text


def _decode(tokens: list[int], tokenizer: Any) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens))
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Control characters would act on the terminal instead of being seen.
    return shown(text)


def _rejections(rejected: list[tuple[int, RowError]], num_shown: int) -> list[str]:
    if not rejected:
        return []
    kinds = Counter(error.kind for _, error in rejected)
    summary = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    lines = [f"--- {len(rejected)} of the first {len(rejected) + num_shown} rows cannot be used: {summary}"]
    lines += [f"row {index}: {error.reason}" for index, error in rejected[:20]]
    return ["\n".join(lines + (["..."] if len(rejected) > 20 else []))]
