import dataclasses
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.testing import assert_close
from transformers import GPT2Config

from oa_train.batches import Batch
from oa_train.checks import check_choice
from oa_train.engine.forward import scored_logits
from oa_train.errors import ConfigurationError, ModelError, TaskError
from oa_train.models.loading import load_model
from oa_train.models.spec import BUILT_IN, LMSpec
from oa_train.tasks import IOI, GrammarTask, GreaterThan, Induction, Prompt, Question, Stream, Task
from oa_train.tasks.encoding import load_tokenizer
from oa_train.tasks.partners import Partners
from oa_train.tasks.task import stream_of
from tests.builders import batch_of

STREAMS = get_args(Stream)
TASKS = [IOI, GreaterThan, Induction]


class Fixed(GrammarTask):
    """Draws one of the given prompts."""

    name = "fixed"

    def __init__(self, *prompts: Prompt, lm: LMSpec = BUILT_IN, **options: Any) -> None:
        super().__init__(lm=lm, **options)
        self.prompts = prompts

    def draw(self, random: random.Random) -> Prompt:
        return random.choice(self.prompts)


def any_stream(task: GrammarTask) -> tuple[Stream, Prompt]:
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
        assert torch.equal(right.tokens[rows, right.scored[:, 0]], left.tokens[rows, left.scored[:, 0]])
        assert torch.equal(right.positions[rows, right.scored[:, 0]], left.positions[rows, left.scored[:, 0]])
        assert [row[-1] for row in real_tokens(left)] == left.tokens[rows, left.scored[:, 0]].tolist()
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
        for pieces, ids in ((prompt.answers, batch.answers[row, 0]), (prompt.distractors, batch.distractors[row, 0])):
            whole = task.encoder.encode([prompt.text + piece for piece in pieces])
            before = task.encoder.encode([prompt.text])[0]
            assert whole == [[*before, token] for token in ids[ids >= 0].tolist()]
        assert not set(batch.answers[row, 0].tolist()) & set(batch.distractors[row, 0].tolist()) - {-1}


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
        assert torch.equal(other.tokens[rows, batch.scored[:, 0]], batch.tokens[rows, batch.scored[:, 0]])


def test_numbers_of_answers_may_differ() -> None:
    stream, _ = any_stream(Fixed(Prompt("Then Anna", (" Paul",))))
    task = Fixed(Prompt("Then Anna", (" Paul", " Mary")))
    batch = task.batch(stream, 0, 2)
    assert (batch.answers >= 0).all()
    assert batch.distractors.shape == (2, 1, 0)
    assert batch.counterfactual_tokens is None
    batch = GreaterThan().batch("train", 0, 8)
    answers = batch.answers[:, 0]
    counts = (answers >= 0).sum(dim=1)
    assert counts.unique().numel() > 2
    assert all((row[count:] == -1).all() for row, count in zip(answers, counts, strict=True))


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


@pytest.mark.parametrize(
    "option",
    ["batch_size", "batches_per_epoch", "n_validation", "n_test", "n_means", "evaluation_batch_size", "n_tokens"],
)
@pytest.mark.parametrize("kind", TASKS)
def test_numbers_must_be_positive(kind: type[Task], option: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{option} is 0; expected at least [12]"):
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
    assert all(isinstance(value, int | float | str | None) for value in description.values())
    assert description == kind(batch_size=3, n_test=5, padding_side="left").describe()
    others = [kind(seed=1).describe(), kind(lm=bytes_lm).describe()]
    assert all(description != other for other in others)


def test_options_enter_the_description() -> None:
    descriptions = [
        IOI().describe(), IOI(order="ABBA").describe(), IOI(distractor_names=0.0).describe(),
        Induction().describe(), Induction(length=5).describe(), Induction(repeated=2).describe(),
        Induction(repeated=2, answer_positions="every").describe(), IOI(n_tokens=15).describe(),
    ]  # fmt: skip
    assert all(one != other for one, other in pairwise(descriptions))
    assert len({str(each) for each in descriptions}) == len(descriptions)


def test_the_evaluation_batch_size_is_what_batches_are_unless_told_otherwise() -> None:
    task = IOI(evaluation_batch_size=3)
    assert [len(batch) for batch in task.batches("test", 7)] == [3, 3, 1]
    assert [len(batch) for batch in task.batches("test", 7, 5)] == [5, 2]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stream", ["train", "means", "test"])
def test_only_prompts_of_n_tokens_are_drawn(side: str, stream: Stream) -> None:
    task = IOI(n_tokens=18, padding_side=side)
    batch = task.batch(stream, 0, 24)
    assert batch.lengths.tolist() == [18] * 24
    assert batch.tokens.shape == (24, 18)
    assert not batch.padded
    assert all(stream_of(task.prompt(stream, index).text) == stream for index in range(24))
    assert len({task.prompt(stream, index).text for index in range(24)}) > 20


def test_a_length_that_few_prompts_have_is_found() -> None:
    share = sum(IOI().batch("train", 0, 200).lengths.tolist().count(length) for length in (15, 24)) / 200
    assert share < 0.1
    for length in (15, 24):
        batch = IOI(n_tokens=length).batch("test", 0, 12)
        assert batch.lengths.tolist() == [length] * 12


def test_n_tokens_counts_the_bos() -> None:
    lengths = [IOI(n_tokens=18, lm=LMSpec(bos=bos)).batch("train", 0, 1).tokens.shape[1] for bos in ("auto", "none")]
    assert lengths == [18, 18]
    texts = [IOI(n_tokens=n, lm=LMSpec(bos=bos)).prompt("train", 0).text for n, bos in ((18, "auto"), (17, "none"))]
    assert texts[0] == texts[1]


def test_a_length_that_does_not_occur_is_refused_with_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oa_train.tasks.grammar.ATTEMPTS", 30)
    with pytest.raises(TaskError, match=r"n_tokens is 40, .* task ioi .* lengths are 1\d, 1\d, (\d\d, )+2\d\."):
        IOI(n_tokens=40).prompt("train", 0)
    one_length = len(Induction().encoder.encode([Induction().prompt("train", 0).text])[0])
    with pytest.raises(TaskError, match=rf"n_tokens is 3, .* task induction .* lengths are {one_length}\."):
        Induction(n_tokens=3).batch("train", 0)


# Two questions, three, and one; the first text is the longest, so both others are padded.
CHAINS = [
    ("Then Anna and Paul met Anna and Mary", (" Paul", " Mary")),
    ("Then Paul met Mary and Anna", (" Mary", " Anna", " Paul")),
    ("Then Mary met", (" Anna",)),
]
BEGINNINGS = [
    ["Then Anna and", CHAINS[0][0]],
    ["Then Paul", "Then Paul met Mary and", CHAINS[1][0]],
    [CHAINS[2][0]],
]


class Chains(Task):
    """Prompts with different numbers of questions, in turn."""

    name = "chains"

    def prompt(self, stream: Stream, index: int) -> Prompt:
        text, answers = CHAINS[index % 3]
        *earlier, last = [
            Question(begins, (answer,), (" David", " James")[:number])
            for number, (begins, answer) in enumerate(zip(BEGINNINGS[index % 3], answers, strict=True))
        ]
        assert last.text == text
        return Prompt(last.text, last.answers, last.distractors, earlier=tuple(earlier))


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_with_fewer_questions_repeat_their_last_one_without_weight(side: str) -> None:
    task = Chains(answer_positions="every", padding_side=side)
    batch = task.batch("train", 0, 3)
    width = batch.tokens.shape[1]
    ids = [task.encoder.encode(begins) for begins in BEGINNINGS]
    for row, begins in enumerate(ids):
        padding = width - len(begins[-1]) if side == "left" else 0
        columns = [padding + len(tokens) - 1 for tokens in begins]
        assert batch.scored[row].tolist() == columns + columns[-1:] * (3 - len(begins))
        for place, tokens in enumerate(begins):
            assert int(batch.tokens[row, batch.scored[row, place]]) == tokens[-1]
        answers = [task.encoder.continuation(CHAINS[row][0], answer) for answer in CHAINS[row][1]]
        assert batch.answers[row, :, 0].tolist() == answers + answers[-1:] * (3 - len(begins))
        counts = [0, 1, 2][: len(begins)]
        assert (batch.distractors[row] >= 0).sum(dim=-1).tolist() == counts + counts[-1:] * (3 - len(begins))
    expected = torch.tensor([[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3], [1, 0, 0]])
    assert_close(batch.weights, expected)
    assert Chains(padding_side=side).batch("train", 0, 3).scored.shape == (3, 1)


def test_a_question_that_ends_inside_a_token_is_refused() -> None:
    question = Question("Then Anna and Pa", (" Paul",))
    task = Fixed(Prompt("Then Anna and Paul", (" Mary",), earlier=(question,)), answer_positions="every")
    with pytest.raises(TaskError, match=r"tokens of 'Then Anna and Pa' are not those with which 'Then Anna and Paul'"):
        task.batch(any_stream(task)[0], 0)
    last_alone = Fixed(*task.prompts)
    assert last_alone.batch(any_stream(last_alone)[0], 0, 1).scored.shape == (1, 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padded", [False, True])
def test_every_scored_position_equals_a_prompt_of_its_own_that_ends_there(side: str, padded: bool) -> None:
    model = load_model(LMSpec(dtype="float64"))
    options: dict[str, Any] = {"answer_positions": "every", "padding_side": side}
    task = Chains(**options) if padded else Induction(repeated=3, **options)
    batch = task.batch("train", 0, 3)
    assert batch.padded == padded
    logits = scored_logits(model, batch)
    for row in range(3):
        prompt = task.prompt("train", row)
        for place, question in enumerate((*prompt.earlier, prompt)):
            alone = batch_of(task.encoder.encode([question.text]))
            assert_close(logits[row, place], scored_logits(model, alone)[0, 0], rtol=0, atol=1e-12)


OPTIONS = {
    "batch_size": 3, "batches_per_epoch": 7, "n_validation": 5, "n_test": 6, "n_means": 4, "padding_side": "left",
    "evaluation_batch_size": 9, "n_tokens": 18, "answer_positions": "every", "seed": 11,
}  # fmt: skip


@pytest.mark.parametrize("kind", TASKS)
def test_every_option_of_every_task_is_offered_and_explained_on_the_command_line(kind: type[Task]) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Task, "data")
    words = [f"--data={kind.__name__}", *(f"--data.{name}={value}" for name, value in OPTIONS.items())]
    task = parser.instantiate_classes(parser.parse_args(words)).data
    assert type(task) is kind
    assert {name: getattr(task, name) for name in OPTIONS} == OPTIONS
    from_python = kind(**OPTIONS)
    assert from_python.describe() == task.describe()


@pytest.mark.parametrize("kind", TASKS)
def test_the_help_of_a_task_explains_every_option(kind: type[Task], capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Task, "data")
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data.help={kind.__name__}"])
    page = " ".join(capsys.readouterr().out.split())
    for said in (
        "prompts in a training batch",
        "side on which shorter prompts of a batch are padded",
        "prompts per batch when the model is only evaluated; limits memory, not results",
        "only prompts of this many tokens, including a prepended BOS",
        "`last` scores each prompt's last answer, `every` the earlier ones as well",
    ):
        assert said in page
    for name in OPTIONS:
        assert f"--data.init_args.{name}" in page or f"--data.{name}" in page


PEOPLE = [("Anna", "Paul", "park"), ("Mary", "Tom", "store"), ("Emily", "Kate", "library")]


class Listed(Task):
    """Reads its prompts from a list.

    Args:
        repeats: how often.
        **options: the options of every task.
    """

    name = "listed"

    def __init__(self, *, repeats: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.prompts = [self.read(*names) for names in PEOPLE] * repeats

    def read(self, receiver: str, giver: str, place: str) -> Prompt:
        text = f"Then, {receiver} and {giver} met at the {place}. {giver} handed the ring to"
        places = {"S1": text.index(giver), "S2": text.rindex(giver)}
        spans = {name: (start, start + len(giver)) for name, start in places.items()}
        return Prompt(text, (f" {receiver}",), (f" {giver}",), spans={"met": "met", **spans})

    def prompt(self, stream: Stream, index: int) -> Prompt:
        return self.prompts[(STREAMS.index(stream) + index) % len(self.prompts)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_task_that_reads_its_prompts_from_a_list_works_like_any_other(side: str) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Task, "data")
    words = ["--data=Listed", "--data.repeats=2", "--data.n_means=3", f"--data.padding_side={side}"]
    task = parser.instantiate_classes(parser.parse_args(words)).data
    assert type(task) is Listed
    assert not hasattr(task, "n_tokens")
    bos = task.tokenizer.bos_token_id
    assert task.describe() == {"name": "listed", "seed": 0, "answer_positions": "last", "bos_token_id": bos}
    batch = task.batch("train", 0, 3)
    assert real_tokens(batch) == task.encoder.encode([prompt.text for prompt in task.prompts[:3]])
    assert batch.spans.keys() == {"met", "S1", "S2"}
    for name in ("S1", "S2"):
        rows = zip(batch.tokens, batch.spans[name], strict=True)
        assert [task.tokenizer.decode(row[inside]) for row, inside in rows] == [giver for _, giver, _ in PEOPLE]
    assert torch.equal(batch.tokens[batch.spans["met"]].unique(), torch.tensor(task.encoder.encode(["met"])[0][1:]))
    assert batch.protected.sum(dim=1).tolist() == [1, 1, 1]
    assert (batch.tokens[batch.protected] == bos).all()
    logits = scored_logits(load_model(LMSpec()), batch)[:, 0]
    assert torch.equal(logits.argmax(dim=-1), batch.answers[:, 0, 0])
    partners = Partners(task, 0, ("S2",))(batch)
    assert torch.equal(partners.attention_mask, batch.attention_mask)


def test_a_prompt_that_lacks_a_span_is_refused() -> None:
    task = Listed()
    second = task.prompts[1]
    task.prompts[1] = dataclasses.replace(second, spans={"met": "met", "S2": second.spans["S2"]})
    message = r"The prompt 'Then, Mary and .*' lacks the spans S1: it names met, S2, and other .* name met, S1, S2\."
    for prompts in (range(3), range(1)):
        with pytest.raises(TaskError, match=message):
            [task.batch_of("train", numbers) for numbers in (prompts, range(1, 3))]
    task.prompts[1] = dataclasses.replace(second, spans={**second.spans, "park": "store"})
    with pytest.raises(TaskError, match=r"names further spans: it names met, S1, S2, park"):
        task.batch("train", 0, 3)


def test_a_batch_without_spans_has_none() -> None:
    stream, prompt = any_stream(Fixed(Prompt("Then Anna", (" Paul",))))
    assert prompt.spans == {}
    assert hash(prompt) == hash(dataclasses.replace(prompt, spans={"it": "Anna"}))
    assert Fixed(prompt).batch(stream, 0, 2).spans == {}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_of_every_task_are_words_and_the_last_token(kind: type[Task], side: str, bytes_lm: LMSpec) -> None:
    for lm in (LMSpec(), bytes_lm):
        task = kind(lm=lm, padding_side=side)
        batch = task.batch("test", 0, 24)
        for row in range(24):
            prompt = task.prompt("test", row)
            assert batch.spans.keys() == prompt.spans.keys()
            for name, span in prompt.spans.items():
                word = prompt.text[slice(*span)]
                covered = task.tokenizer.decode(batch.tokens[row, batch.spans[name][row]]).strip()
                assert covered.endswith(word) if name == "end" else covered == word
        assert torch.equal(batch.spans["end"], torch.zeros_like(batch.protected).scatter(1, batch.scored, True))
        assert not any((inside & ~batch.attention_mask).any() for inside in batch.spans.values())
        assert torch.equal(batch.protected.long().sum(dim=1), torch.ones(24, dtype=torch.long))
        assert not any((inside & batch.protected).any() for inside in batch.spans.values())
        assert torch.equal(batch.layout.span("end"), batch.layout.span("-1"))


def test_the_bos_enters_the_description(lm: LMSpec) -> None:
    task, without = Induction(lm=lm), Induction(lm=dataclasses.replace(lm, bos="none"))
    assert task.describe()["bos_token_id"] == task.bos_token_id == task.encoder.bos
    assert without.describe()["bos_token_id"] is None
    assert not without.batch("train", 0).protected.any()


def test_a_bos_outside_the_model_s_vocabulary_is_refused_before_any_prompt(tmp_path: Path) -> None:
    load_tokenizer(LMSpec()).save_pretrained(tmp_path)
    GPT2Config(vocab_size=200, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(LMSpec(str(tmp_path)))
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(200)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has the id 200, but the model's embedding has 200 rows"):
        IOI(lm=LMSpec(str(tmp_path)))
