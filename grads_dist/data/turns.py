"""Where the assistant's turns lie in a conversation's text, under a template that does not mark them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grads_dist.data.calls import called, common_prefix
from grads_dist.data.rows import RowError
from grads_dist.data.template import Messages

Render = Callable[..., str]
"""(messages, whether with the header that prompts an answer) -> text, with the tools of one conversation."""


@dataclass(frozen=True)
class Turn:
    """What an assistant's message adds to the text: characters `start` to `end`.

    What it says itself ends at `text_end`: a special token before is its text, one after it ends the turn.
    """

    start: int
    end: int
    text_end: int


def prefix_turns(
    render: Render, text: str, messages: Messages, num_prompt: int, special_texts: Sequence[str]
) -> list[Turn]:
    """The assistant's turns behind the first `num_prompt` messages, in `text`, which renders all messages.

    special_texts: what the special tokens look like. Raises RowError where a turn cannot be located, or does
    not contain what its message says.
    """
    turns = []
    for k, message in enumerate(messages):
        if k < num_prompt or message["role"] != "assistant":
            continue
        after = text if k + 1 == len(messages) else render(messages[: k + 1])
        if not text.startswith(after):
            turns.append(_inner_turn(render, text, messages, k, after, special_texts))
            continue
        start = _turn_start(render, messages, k, after)
        said = message.get("content", "").strip()
        if _squeeze(said) not in _squeeze(after[start:]):
            raise _changed(k)
        found = after.find(said, start)
        turns.append(Turn(start, len(after), start if found < 0 else found + len(said)))
    return turns


def check_trained(messages: Messages, num_prompt: int) -> None:
    """Raise RowError for an answer behind the prompt that the file wants to carry no loss: it would."""
    for k, message in enumerate(messages):
        for key in ("weight", "train"):
            is_off = message.get(key) is not None and not message[key]
            if k >= num_prompt and message["role"] == "assistant" and is_off:
                raise RowError(
                    "single turn",
                    f"messages[{k}].{key} is {message[key]!r}: loss on single turns is not supported; "
                    "allowed: rows whose answers all carry loss, or the last as the completion of a prompt",
                )


def check_said(messages: Messages, marked: str) -> None:
    """Raise RowError if `marked`, what a template marks as the answers, has the end of not even one of them.

    Templates may drop thoughts, and whole answers; one made for content of another kind drops them all.
    """
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    ends = {k: messages[k].get("content", "").split()[-1:] for k in answers}
    spoken = [k for k in answers if ends[k]]
    if marked and spoken and not any(ends[k][0] in marked for k in spoken):
        raise _changed(spoken[0])


def check_prefix(text: str, prefix: str, k: int) -> None:
    """Raise RowError if `prefix`, the text before messages[k], is not what the whole text begins with."""
    if not text.startswith(prefix):
        raise _not_located(k)


def _inner_turn(
    render: Render, text: str, messages: Messages, k: int, after: str, special_texts: Sequence[str]
) -> Turn:
    """Turn k, which looks different at the end of a conversation (`after`) from inside of it (`text`).

    Templates put an empty thought in front of the last answer, or an end of the document behind it. What
    both renderings share around the answer is the turn, up to a special token that both have behind it.
    """
    start = _turn_start(render, messages, k, text)
    said = messages[k].get("content", "").strip()
    anchor = said or next(iter(called(messages[k], k)), "")
    inner, last = text.find(anchor, start), after.find(anchor, start)
    if inner < 0 or last < 0:
        raise _changed(k)
    inner_end = inner + len(said)
    while last >= 0:
        # An anchor that belongs to a later turn has that turn's header before it, which `after` has not.
        if after[start:last].endswith(text[start:inner]):
            rest = after[last + len(said) :]
            tail = rest[: common_prefix(text[inner_end : inner_end + len(rest)], rest)]
            closings = [found + len(mark) for mark in special_texts if (found := tail.rfind(mark)) >= 0]
            if closings:
                return Turn(start, inner_end + max(closings), inner_end)
        last = after.find(anchor, last + 1)
    raise _not_located(k)


def _turn_start(render: Render, messages: Messages, k: int, after: str) -> int:
    """Where message k begins in `after`, a text that holds it, behind the header of its turn."""
    # Templates may look at the first message, so nothing is rendered where nothing precedes.
    before = render(messages[:k], True) if k else ""
    plain = render(messages[:k]) if k else ""
    if before != plain and after.startswith(before):
        return len(before)
    check_prefix(after, plain, k)
    # The template has no header to prompt with, or one that answers do not begin with, as where it makes the
    # model think first: the header is what the turn of another answer begins with, too.
    content = messages[k].get("content", "")
    other = {"role": "assistant", "content": "1" if content.lstrip().startswith("0") else "0"}
    common = common_prefix(after, render([*messages[:k], other]))
    if common < len(plain):
        raise RowError("chat template", f"the text before messages[{k}] depends on what it says")
    # The space before the first word belongs to that word's token.
    return len(plain) + len(after[len(plain) : common].rstrip(" "))


def _not_located(k: int) -> RowError:
    return RowError(
        "chat template",
        f"the turn messages[{k}] cannot be located: the chat template renders what comes before it "
        "differently once it is there; allowed: a template whose text only grows, or one with "
        "{% generation %} marks (data.chat_template)",
    )


def _changed(k: int) -> RowError:
    return RowError("chat template", f"the chat template changes what messages[{k}] says")


def _squeeze(text: str) -> str:
    """`text` without white space, which templates may trim."""
    return "".join(text.split())
