"""Word lists of the task grammars, and the selection of words that a tokenizer encodes as single tokens."""

import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from oa_train.errors import TaskError
from oa_train.tasks.encoding import CONTEXT, PromptEncoder

FOLDER = "words"


@functools.cache
def read_data(name: str) -> Any:
    """Read `words/<name>.json`. The value is shared between callers, who must not change it."""
    file = importlib.resources.files("oa_train.tasks") / FOLDER / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def read_words(name: str) -> tuple[str, ...]:
    """Read a list of words: names, places, objects, nouns or induction."""
    return tuple(read_data(name))


def single_token_words(encoder: PromptEncoder, task: str, name: str, minimum: int) -> tuple[str, ...]:
    """The words of list `name` that are single tokens, at least `minimum` of them; `task` is named in the error.

    Prompts that differ in one word then have the same number of tokens, whatever the word.

    Raises:
        TaskError: there are fewer than `minimum`.
    """
    words = read_words(name)
    kept = tuple(word for word in words if encoder.is_single_token(word))
    require_enough(kept, words, task=task, what=f"words of its list {name!r} are single tokens", minimum=minimum)
    return kept


def vocabulary_words(encoder: PromptEncoder, task: str, minimum: int) -> tuple[str, ...]:
    """All tokens that are a space followed by letters, as words in the order of their ids.

    Raises:
        TaskError: there are fewer than `minimum`.
    """
    tokenizer = encoder.tokenizer
    ids = range(min(len(tokenizer), encoder.vocabulary_size))
    pieces = [piece.strip() for piece in tokenizer.batch_decode([[token] for token in ids])]
    candidates = {token: piece for token, piece in zip(ids, pieces, strict=True) if piece.isalpha()}
    texts = [CONTEXT, *(f"{CONTEXT} {piece}" for piece in candidates.values())]
    before, *rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = tuple(
        piece for (token, piece), row in zip(candidates.items(), rows, strict=True) if row == [*before, token]
    )
    require_enough(kept, pieces, task=task, what="tokens of the vocabulary are words", minimum=minimum)
    return kept


def require_enough(kept: Sequence[str], words: Sequence[str], *, task: str, what: str, minimum: int) -> None:
    """Refuse a tokenizer that knows too few words of a list.

    Args:
        kept: those of `words` that the tokenizer knows.
        words: the whole list.
        task: name of the task, for the message.
        what: what the words are and what is true of those kept, for the message.
        minimum: fewest words that the task needs.

    Raises:
        TaskError: fewer are kept.
    """
    if len(kept) < minimum:
        raise TaskError(
            f"The task {task} cannot be posed to this tokenizer: {len(kept)} of the {len(words)} {what} in the middle "
            f"of a sentence; at least {minimum} are needed.\nChoose a model whose tokenizer keeps them whole, or "
            "another task."
        )
