"""`oa-train check-data`: a task's prompts as a model reads them, and the clean model's results on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oa_train.ablations.clean_ability import ENOUGH, Ability, clean_ability
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
from oa_train.diagnostics.prompts import LEGEND, prompt_lines
from oa_train.diagnostics.task_facts import ability_rows, stream_rows, wrong_rows
from oa_train.models.loading import load_on_device
from oa_train.tasks.task import Stream, Task

# Largest number of wrongly answered prompts that are listed.
MOST_WRONG = 10

# Streams whose prompts are shown, and streams on which the model runs.
_SHOWN: tuple[Stream, ...] = ("train", "test")
_RUN: tuple[Stream, ...] = ("train", "validation", "test")


def check_data(words: Sequence[str]) -> dict[str, Any]:
    """Show prompts as tokens, streams, lengths, the clean model's ability and left-out rows; returns the figures.

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
    console.print(LEGEND)
    for stream in _SHOWN:
        size = task.size(stream)
        for number in range(options.shown if size is None else min(options.shown, size)):
            console.print("\n".join(prompt_lines(task, stream, number)), soft_wrap=True)
    figures: dict[str, Any] = {"streams": stream_rows(task)}
    print_table("streams", figures["streams"])
    remarks = list(task.remarks)
    if options.run_model:
        abilities = _abilities(task, options)
        figures["clean_model"] = ability_rows(abilities)
        print_table(f"clean model {Path(task.lm.name).name}", figures["clean_model"])
        if task.solvable:
            _show_wrong(task, abilities)
            remarks += [abilities["validation"].warning or ""]
    for remark in filter(None, remarks):
        console.print(f"- {remark}", soft_wrap=True)
    if left_out := task.left_out_report():
        console.print(f"left out:\n{left_out}", soft_wrap=True)
    return figures


def _parser() -> ExplainingParser:
    parser = ExplainingParser(
        prog="oa-train check-data",
        description="Show the prompts of a task as a model reads them, and how well the model does on them.",
    )
    add_config(parser)
    for name, kind, default, meaning in (
        ("seed_everything", int, 0, "seed of all draws"),
        ("shown", int, 2, "number of prompts of train, and of test, that are shown as tokens"),
        ("n_prompts", int, ENOUGH, "largest number of prompts per stream on which the model runs"),
        ("run_model", bool, True, "false: load only the tokenizer"),
        ("device", str, "auto", "device of the model: auto, cpu, cuda, cuda:1"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
    add_model_and_task(parser)
    link_model(parser)
    return parser


def _abilities(task: Task, options: Any) -> dict[Stream, Ability]:
    model, abilities = load_on_device(task.lm, options.device), {}
    for stream in _RUN:
        size = task.size(stream)
        n_prompts = options.n_prompts if size is None else min(options.n_prompts, size)
        with track(n_prompts, f"clean model on {stream} prompts") as advance:
            abilities[stream] = clean_ability(model, task.batches(stream, n_prompts, size=16), advance)
    return abilities


def _show_wrong(task: Task, abilities: dict[Stream, Ability]) -> None:
    rows = wrong_rows(task, abilities)
    if rows:
        n_run = sum(len(ability.top) for ability in abilities.values())
        worst = f", the {MOST_WRONG} worst" if len(rows) > MOST_WRONG else ""
        print_table(f"top token is not an answer: {len(rows)} of {n_run} prompts{worst}", rows[:MOST_WRONG])
