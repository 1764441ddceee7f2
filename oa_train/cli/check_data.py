"""`oa-train check-data`: prompts of a task as a model reads them, and the clean model's results on them."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from oa_train.ablations.ability import ENOUGH, Ability, clean_ability
from oa_train.batches import Batch
from oa_train.checks import check_at_least
from oa_train.cli.bars import track
from oa_train.cli.output import console, print_table
from oa_train.cli.parser import (
    ExplainingParser,
    add_config,
    add_model_and_task,
    check_values,
    link_model,
    make_paths_absolute,
)
from oa_train.cli.quiet import silence_libraries
from oa_train.models.loading import load_model
from oa_train.studies.study import Table
from oa_train.tasks.record_files import report, shorten
from oa_train.tasks.records import Records
from oa_train.tasks.task import Prompt, Question, Stream, Task
from oa_train.tasks.text import Text

# Prompts whose lengths are measured, of a task that draws without end.
DRAWN = 512

# Most wrongly answered prompts that are listed.
MOST_WRONG = 10

# Most tokens of a prompt that are shown, half of them from its end.
MOST_TOKENS = 200

# Most scored positions of a window of text that are listed.
MOST_SCORED = 5

# Streams whose prompts are shown, and streams that the model runs on.
_SHOWN: tuple[Stream, ...] = ("train", "test")
_RUN: tuple[Stream, ...] = ("train", "validation", "test")

Streams = dict[Stream, list[Prompt]]


def check_data(words: Sequence[str]) -> dict[str, Any]:
    """Show prompts as tokens, streams, lengths, the clean model's ability, and what was left out; returns the figures.

    Raises:
        TaskError: the task's prompts cannot be used.
    """
    silence_libraries()
    parser = _parser()
    options = parser.parse_args(list(words))
    check_values(parser, options)
    make_paths_absolute(options)
    check_at_least(2, n_prompts=options.n_prompts)
    task: Task = parser.instantiate_classes(options).data
    streams = _streams(task)
    console.print("| ends a token, > ends a scored one, [ ] holds one that is never ablated")
    for stream in _SHOWN:
        for number, prompt in enumerate(streams[stream][: options.shown]):
            _show_prompt(task, stream, number, prompt)
    figures: dict[str, Any] = {"streams": _stream_rows(task, streams)}
    print_table(Table("streams", figures["streams"]))
    warning = None
    if options.run_model:
        abilities = _abilities(task, streams, options.n_prompts)
        figures["clean_model"] = [_ability_row(stream, ability) for stream, ability in abilities.items()]
        print_table(Table(f"clean model {Path(task.lm.name).name}", figures["clean_model"]))
        if task.solvable:
            _show_wrong(task, abilities)
            warning = abilities["validation"].warning
    for remark in [*task.remarks, *([warning] if warning else [])]:
        console.print(f"- {remark}", soft_wrap=True)
    if isinstance(task, Records) and task.left_out:
        console.print(f"left out:\n{report(task.left_out)}", soft_wrap=True)
    return figures


def _parser() -> ExplainingParser:
    parser = ExplainingParser(
        prog="oa-train check-data",
        description="Show the prompts of a task as a model reads them, and how well the model does on them.",
    )
    add_config(parser)
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of all draws")
    parser.add_argument("--shown", type=int, default=2, help="prompts of train, and of test, that are shown as tokens")
    parser.add_argument(
        "--n_prompts", type=int, default=ENOUGH, help="most prompts of a stream that the model runs on"
    )
    parser.add_argument("--run_model", type=bool, default=True, help="false: load the tokenizer alone")
    add_model_and_task(parser)
    link_model(parser)
    return parser


def _streams(task: Task) -> Streams:
    """All prompts of each stream, or the first ones of a task that draws without end."""
    streams: Streams = {}
    for stream in get_args(Stream):
        size = task.size(stream)
        streams[stream] = [task.prompt(stream, number) for number in range(DRAWN if size is None else size)]
    return streams


def _stream_rows(task: Task, streams: Streams) -> list[dict[str, Any]]:
    rows = []
    used = {"validation": task.n_validation, "test": task.n_test, "means": task.n_means}
    train = {prompt.text for prompt in streams["train"]}
    for stream, prompts in streams.items():
        texts = {prompt.text for prompt in prompts}
        lengths = (
            task.lengths(stream)
            if isinstance(task, Text)
            else [len(ids) for ids in task.encoder.encode(sorted(texts))]
        )
        drawn = task.size(stream) is None
        row: dict[str, Any] = {"stream": f"{stream} (as train)" if stream != "train" and texts == train else stream}
        row["prompts"] = "drawn" if drawn else len(prompts)
        row["distinct texts"] = f"{len(texts)} of {DRAWN}" if drawn else len(texts)
        row["used"] = used.get(stream, "all" if drawn else "repeatedly")
        row["tokens"] = f"{min(lengths)} to {max(lengths)}, median {statistics.median(lengths):g}"
        rows.append(row)
    return rows


def _abilities(task: Task, streams: Streams, n_prompts: int) -> dict[Stream, Ability]:
    model = load_model(task.lm)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    abilities = {}
    for stream in _RUN:
        n_used = min(n_prompts, len(streams[stream]))
        with track(n_used, f"clean model on {stream} prompts") as advance:
            abilities[stream] = clean_ability(model, task.batches(stream, n_used, size=16), advance)
    return abilities


def _ability_row(stream: Stream, ability: Ability) -> dict[str, Any]:
    row: dict[str, Any] = {"stream": stream, "prompts": len(ability.top)}
    row |= {name.replace("_", " "): str(value) for name, value in ability.estimates.items()}
    return row | ({"answer before wrong ones": f"{ability.preferred:.0%}"} if ability.has_distractors else {})


def _show_prompt(task: Task, stream: Stream, number: int, prompt: Prompt) -> None:
    """Print a prompt in tokens: `|` ends each, `>` marks scored ones, brackets a token that is never ablated."""
    batch = task.batch(stream, number, 1)
    ids = batch.tokens[batch.attention_mask].tolist()
    first = int(batch.attention_mask[0].long().argmax())
    scored = [column - first for column in batch.scored[batch.weights > 0].tolist()]
    # Marks at every token would hide the text.
    marked = set(scored) if len(scored) < len(ids) / 2 or len(ids) < MOST_TOKENS // 4 else set()
    place = _place(task, stream, number, prompt)
    lines = [f"{stream} {number}" + (f", {place}" if place else ""), f"  tokens          {_tokens(task, ids, marked)}"]
    if isinstance(task, Text):
        lines += [f"  scored          {line}" for line in _scored_tokens(task, batch, ids, scored)]
    else:
        questions = [*prompt.earlier, prompt] if task.answer_positions == "every" else [prompt]
        lines += [f"  scored          {_scored(question)}" for question in questions]
    flags = task.encoder.span_flags([prompt.text], [prompt.spans])[0]
    for name, inside in flags.items():
        places = [place for place, is_in in enumerate(inside) if is_in]
        inside_span = _tokens(task, [ids[place] for place in places])
        lines.append(f"  {f'span {name}':<15} {inside_span}  ({_range(places)})")
    if prompt.counterfactual is not None:
        other = task.encoder.encode([prompt.counterfactual])[0]
        lines.append(f"  counterfactual  {_tokens(task, other)}")
    console.print("\n".join(lines), soft_wrap=True)


def _place(task: Task, stream: Stream, number: int, prompt: Prompt) -> str:
    """Place of a prompt in its file; empty for prompts that are drawn."""
    if isinstance(task, Text):
        return task.place(stream, number)
    return task.places[prompt.text] if isinstance(task, Records) else ""


def _scored_tokens(task: Task, batch: Batch, ids: Sequence[int], scored: Sequence[int]) -> list[str]:
    """Lines on the scored positions of a window: the first ones, or the last one where there are many."""
    answers = batch.answers[0, :, 0].tolist()
    pairs = [
        f"after {task.tokenizer.decode([ids[place]])!r} (token {place}): {task.tokenizer.decode([answer])!r}"
        for place, answer in zip(scored, answers, strict=False)
    ]
    if len(pairs) == len(ids) - (ids[0] == task.bos_token_id):
        return [f"all {len(pairs)} positions, each by the token that follows; {pairs[-1]}"]
    more = [f"and {len(pairs) - MOST_SCORED} more"] if len(pairs) > MOST_SCORED else []
    return [*pairs[:MOST_SCORED], *more]


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


def _scored(question: Question) -> str:
    answers = ", ".join(map(repr, question.answers[:5])) + (" ..." if len(question.answers) > 5 else "")
    wrong = ", ".join(map(repr, question.distractors[:5])) + (" ..." if len(question.distractors) > 5 else "")
    last = question.text[len(question.text.rstrip().rpartition(" ")[0]) :]
    return f"after {last!r}: {answers} against {wrong or 'all other tokens'}"


def _show_wrong(task: Task, abilities: dict[Stream, Ability]) -> None:
    """Print the prompts that the model gets wrong, the worst first."""
    wrong = []
    for stream, ability in abilities.items():
        for number, (accuracy, difference, top) in enumerate(
            zip(ability.accuracy.tolist(), ability.logit_difference.tolist(), ability.top.tolist(), strict=True)
        ):
            if accuracy < 1:
                prompt = task.prompt(stream, number)
                row = {"prompt": shorten(prompt.text, 70), "answer": repr(prompt.answers[0])}
                row |= {"predicted": repr(task.tokenizer.decode([top])), "logit difference": f"{difference:.2f}"}
                place = _place(task, stream, number, prompt) or f"{stream} {number}"
                wrong.append((difference, {"where": place} | row))
    wrong.sort(key=lambda row: row[0])
    if wrong:
        n_run = sum(len(ability.top) for ability in abilities.values())
        title = f"top token is no answer: {len(wrong)} of {n_run} prompts" + (
            f", the {MOST_WRONG} worst" if len(wrong) > MOST_WRONG else ""
        )
        print_table(Table(title, [row for _, row in wrong[:MOST_WRONG]]))
