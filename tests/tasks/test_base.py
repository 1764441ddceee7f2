import dataclasses
import random
from collections import Counter
from itertools import pairwise
from typing import get_args

import pytest
import torch

from oa_train.batches import Batch
from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.loading import BUILT_IN, LMSpec
from oa_train.tasks import IOI, GreaterThan, Induction, Prompt, Stream, Task
from oa_train.tasks.base import check_choice, stream_of

STREAMS = get_args(Stream)
TASKS = [IOI, GreaterThan, Induction]


class Fixed(Task):
    """Draws one of the given prompts."""

    name = "fixed"

    def __init__(self, *prompts: Prompt, lm: LMSpec = BUILT_IN) -> None:
        super().__init__(lm=lm)
        self.prompts = prompts

    def draw(self, random: random.Random) -> Prompt:
        return random.choice(self.prompts)


def any_stream(task: Task) -> tuple[Stream, Prompt]:
    prompt = task.draw(random.Random(0))
    return stream_of(prompt.text), prompt


def real_tokens(batch: Batch) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(batch.tokens, batch.attention_mask, strict=True)]


@pytest.mark.parametrize("kind", TASKS)
def test_a_prompt_does_not_depend_on_what_was_drawn_before(kind: type[Task]) -> None:
    task, other = kind(), kind()
    forward = [task.prompt("train", index) for index in range(20)]
    other.batch("test", 3)
    backward = [other.prompt("train", index) for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert len({prompt.text for prompt in forward}) > 15


@pytest.mark.parametrize("kind", TASKS)
def test_streams_share_no_prompt_whatever_the_seeds(kind: type[Task]) -> None:
    tasks = {stream: kind(seed=seed) for seed, stream in enumerate(STREAMS)}
    texts = {stream: {task.prompt(stream, index).text for index in range(400)} for stream, task in tasks.items()}
    assert all(len(each) > 350 for each in texts.values())
    assert len(set.union(*texts.values())) == sum(map(len, texts.values()))


def test_streams_get_their_shares_of_the_texts() -> None:
    counts = Counter(stream_of(f"text {number}") for number in range(20_000))
    shares = {stream: round(count / 20_000, 1) for stream, count in counts.items()}
    assert shares == {"train": 0.5, "refit": 0.2, "means": 0.1, "validation": 0.1, "test": 0.1}


def test_seed_stream_and_index_each_change_the_prompt() -> None:
    task = IOI()
    first = task.prompt("train", 0).text
    assert first != task.prompt("train", 1).text
    assert first != task.prompt("refit", 0).text
    assert first != IOI(seed=1).prompt("train", 0).text


@pytest.mark.parametrize("kind", TASKS)
def test_global_generators_are_neither_read_nor_moved(kind: type[Task]) -> None:
    # Python's own generator is moved all the same while tests run, by beartype, which checks items at random.
    torch_before = torch.random.get_rng_state()
    random.seed(1)
    first = kind().batch("train", 0, 8)
    random.seed(2)
    second = kind().batch("train", 0, 8)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(torch.random.get_rng_state(), torch_before)


def test_a_batch_holds_its_own_prompts() -> None:
    task = IOI(batch_size=4)
    batch = task.batch("train", 3)
    assert batch.example_ids.tolist() == [12, 13, 14, 15]
    assert real_tokens(batch) == task.encoder.encode([task.prompt("train", index).text for index in range(12, 16)])
    assert task.batch("train", 1, 2).example_ids.tolist() == [2, 3]


def test_batches_end_with_a_smaller_one() -> None:
    batches = list(IOI().batches("test", 10, 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.example_ids for batch in batches]).tolist() == list(range(10))


@pytest.mark.parametrize("kind", TASKS)
def test_left_and_right_padding_agree_on_every_real_token(kind: type[Task], bytes_lm: LMSpec) -> None:
    for lm in (LMSpec(), bytes_lm):
        right = kind(lm=lm).batch("train", 0, 32)
        left = kind(lm=lm, padding_side="left").batch("train", 0, 32)
        assert real_tokens(right) == real_tokens(left)
        rows = torch.arange(32)
        assert torch.equal(right.tokens[rows, right.scored], left.tokens[rows, left.scored])
        assert torch.equal(right.positions[rows, right.scored], left.positions[rows, left.scored])
        assert [row[-1] for row in real_tokens(left)] == left.tokens[rows, left.scored].tolist()
        assert torch.equal(right.answers, left.answers)
        assert (left.scored == left.tokens.shape[1] - 1).all()
        assert right.padded == left.padded == (not bool(right.attention_mask.all()))
    if kind is IOI:
        assert right.padded


def test_every_prompt_starts_with_bos_unless_it_is_turned_off(lm: LMSpec) -> None:
    task = Induction(lm=lm)
    assert (task.batch("train", 0).tokens[:, 0] == task.bos_token_id).all()
    without = Induction(lm=dataclasses.replace(lm, bos="none"))
    assert without.bos_token_id is None
    assert torch.equal(without.batch("train", 0).tokens, task.batch("train", 0).tokens[:, 1:])


@pytest.mark.parametrize("kind", [IOI, Induction])
def test_answers_and_distractors_follow_the_text_as_one_token(kind: type[Task], lm: LMSpec) -> None:
    task = kind(lm=lm)
    batch = task.batch("validation", 0, 24)
    for row in range(24):
        prompt = task.prompt("validation", row)
        for pieces, ids in ((prompt.answers, batch.answers[row]), (prompt.distractors, batch.distractors[row])):
            whole = task.encoder.encode([prompt.text + piece for piece in pieces])
            before = task.encoder.encode([prompt.text])[0]
            assert whole == [[*before, token] for token in ids[ids >= 0].tolist()]
        assert not set(batch.answers[row].tolist()) & set(batch.distractors[row].tolist()) - {-1}


@pytest.mark.parametrize("kind", [IOI, Induction])
def test_counterfactuals_are_parallel_and_another_text(kind: type[Task], lm: LMSpec) -> None:
    for side in ("left", "right"):
        batch = kind(lm=lm, padding_side=side).batch("train", 0, 32)
        other = batch.counterfactual()
        assert other.tokens.shape == batch.tokens.shape
        changed = (other.tokens != batch.tokens) & batch.attention_mask
        assert (changed.sum(dim=1) == (3 if kind is IOI else 1)).all()
        assert torch.equal(other.tokens[~batch.attention_mask], batch.tokens[~batch.attention_mask])
        rows = torch.arange(32)
        assert torch.equal(other.tokens[rows, batch.scored], batch.tokens[rows, batch.scored])


def test_numbers_of_answers_may_differ() -> None:
    stream, _ = any_stream(Fixed(Prompt("Then Anna", (" Paul",))))
    task = Fixed(Prompt("Then Anna", (" Paul", " Mary")))
    batch = task.batch(stream, 0, 2)
    assert (batch.answers >= 0).all()
    assert batch.distractors.shape == (2, 0)
    assert batch.counterfactual_tokens is None
    batch = GreaterThan().batch("train", 0, 8)
    counts = (batch.answers >= 0).sum(dim=1)
    assert counts.unique().numel() > 2
    assert all((row[count:] == -1).all() for row, count in zip(batch.answers, counts, strict=True))


def test_a_counterfactual_of_another_length_is_refused() -> None:
    task = Fixed(Prompt("Then Anna", (" Paul",), counterfactual="Then Anna and Mary"))
    with pytest.raises(TaskError, match=r"'Then Anna and Mary' has 5 tokens and its prompt 'Then Anna' has 3"):
        task.batch(any_stream(task)[0], 0)


def test_an_answer_of_several_tokens_is_refused() -> None:
    task = Fixed(Prompt("Then Anna", (" Zebedee",)))
    with pytest.raises(TaskError, match=r"' Zebedee' after 'Then Anna' is not one token"):
        task.batch(any_stream(task)[0], 0)


def test_a_task_with_too_few_prompts_is_refused() -> None:
    task = Fixed(Prompt("Then Anna", (" Paul",)))
    stream, _ = any_stream(task)
    other = next(name for name in STREAMS if name != stream)
    with pytest.raises(TaskError, match=rf"None of 1000 prompts that the task fixed drew .*'{other}'.*too few"):
        task.prompt(other, 0)


@pytest.mark.parametrize("option", ["batch_size", "batches_per_epoch", "n_validation", "n_test", "n_means"])
@pytest.mark.parametrize("kind", TASKS)
def test_numbers_must_be_positive(kind: type[Task], option: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{option} is 0; expected a number of at least [12]"):
        kind(**{option: 0})
    assert getattr(kind(**{option: 7}), option) == 7


def test_sizes_must_be_positive() -> None:
    task = IOI()
    with pytest.raises(ConfigurationError, match="size is 0"):
        task.batch("train", 0, 0)
    with pytest.raises(ConfigurationError, match="size is -1"):
        next(task.batches("train", 4, -1))


def test_a_choice_lists_what_was_expected() -> None:
    with pytest.raises(ConfigurationError, match="padding_side is 'middle'; expected one of left, right"):
        check_choice("padding_side", "middle", ("left", "right"))


@pytest.mark.parametrize("kind", TASKS)
def test_a_description_is_plain_and_tells_options_and_words_apart(kind: type[Task], bytes_lm: LMSpec) -> None:
    description = kind().describe()
    assert description["name"] == kind.name
    assert all(isinstance(value, int | float | str) for value in description.values())
    assert description == kind(batch_size=3, n_test=5, padding_side="left").describe()
    others = [kind(seed=1).describe(), kind(lm=bytes_lm).describe()]
    assert all(description != other for other in others)


def test_options_enter_the_description() -> None:
    descriptions = [
        IOI().describe(), IOI(order="ABBA").describe(), IOI(distractor_names=0.0).describe(),
        Induction().describe(), Induction(length=5).describe(),
    ]  # fmt: skip
    assert all(one != other for one, other in pairwise(descriptions))
    assert len({str(each) for each in descriptions}) == len(descriptions)
