"""A prompt as a model reads it: its tokens, its scored positions, its spans."""

from collections.abc import Sequence

from oa_train.batches import Batch
from oa_train.tasks.task import Stream, Task

LEGEND = "| ends a token, > ends a scored one, [ ] holds one that is never ablated"

# Maximum number of tokens shown of a prompt, half of them from its end.
MOST_TOKENS = 200

# Maximum number of scored positions, and of answers at a position, that are listed.
MOST_LISTED = 5


def prompt_lines(task: Task, stream: Stream, number: int) -> list[str]:
    """Lines with a prompt's tokens (see `LEGEND`), scored positions and their answers, spans and counterfactual."""
    prompt, batch = task.prompt(stream, number), task.batch(stream, number, 1)
    ids = batch.tokens[batch.attention_mask].tolist()
    first = int(batch.attention_mask[0].long().argmax())
    scored = [column - first for column in batch.scored[batch.weights > 0].tolist()]
    # Marks at every token would hide the text.
    marked = set(scored) if len(scored) < len(ids) / 2 or len(ids) < MOST_TOKENS // 4 else set()
    place = task.place(stream, number)
    lines = [f"{stream} {number}" + (f", {place}" if place else ""), f"  tokens          {_tokens(task, ids, marked)}"]
    lines += [f"  scored          {line}" for line in _scored(task, batch, ids, scored)]
    for name, inside in task.encoder.span_flags([prompt.text], [prompt.spans])[0].items():
        places = [place for place, is_inside in enumerate(inside) if is_inside]
        text = _tokens(task, [ids[place] for place in places])
        lines.append(f"  {f'span {name}':<15} {text}  ({_range(places)})")
    if prompt.counterfactual is not None:
        lines.append(f"  counterfactual  {_tokens(task, task.encoder.encode([prompt.counterfactual])[0])}")
    return lines


def _scored(task: Task, batch: Batch, ids: Sequence[int], scored: Sequence[int]) -> list[str]:
    """Scored positions: the first few, or only the last if every position is scored by the token that follows."""
    lines = [
        f"after {task.tokenizer.decode([ids[place]])!r} (token {place}): {_words(task, answers)} against "
        f"{_words(task, wrong) or 'all other tokens'}"
        for place, answers, wrong in zip(
            scored, batch.answers[0].tolist(), batch.distractors[0].tolist(), strict=False
        )
    ]
    if len(lines) == len(ids) - (ids[0] == task.bos_token_id):
        return [f"all {len(lines)} positions, each by the token that follows; {lines[-1]}"]
    more = [f"and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
    return [*lines[:MOST_LISTED], *more]


def _words(task: Task, ids: Sequence[int]) -> str:
    words = [repr(task.tokenizer.decode([token])) for token in ids if token >= 0]
    return ", ".join(words[:MOST_LISTED]) + (" ..." if len(words) > MOST_LISTED else "")


def _tokens(task: Task, ids: Sequence[int], scored: set[int] | None = None) -> str:
    shown = []
    for place, token in enumerate(ids):
        text = str(task.tokenizer.decode([token])).replace("\n", "\\n")
        text = f"[{text}]" if place == 0 and token == task.bos_token_id else text
        shown.append(f"{text}>" if place in (scored or ()) else text)
    if len(shown) > MOST_TOKENS:
        half = MOST_TOKENS // 2
        shown[half:-half] = [f" ... {len(shown) - 2 * half} tokens ... "]
    return "|".join(shown)


def _range(places: list[int]) -> str:
    first, last = places[0], places[-1]
    return f"token {first}" if first == last else f"tokens {first} to {last}"
