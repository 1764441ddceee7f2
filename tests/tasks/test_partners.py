"""Partners that agree with their prompts in the lengths of spans."""

import dataclasses

import pytest
import torch

from oa_train.batches import Batch
from oa_train.errors import TaskError
from oa_train.models.spec import LMSpec
from oa_train.tasks import IOI, Prompt, Stream, Task
from oa_train.tasks.partners import Partners
from tests.builders import small_ioi

OBJECTS = ("ring", "the silver ring", "a ring and a key", "a key")


class Sentences(Task):
    """Prompts in which a thing has one token to five, and two sentences take turns."""

    name = "sentences"

    def prompt(self, stream: Stream, index: int) -> Prompt:
        thing, place = OBJECTS[index % 4], ("at the park", "at the very store")[index // 4 % 2]
        start = "Then Paul" if stream == "means" else "Then Mary"
        text = f"{start} met {place} with {thing}"
        return Prompt(text, (" and",), spans={"thing": thing, "place": place})


def lengths(batch: Batch, name: str) -> list[int]:
    return batch.spans[name].sum(dim=1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spans", [("thing",), ("place",), ("thing", "place")])
def test_partners_have_spans_of_the_same_length(side: str, spans: tuple[str, ...]) -> None:
    task = Sentences(padding_side=side, n_means=24)
    batch = task.batch("test", 0, 8)
    partner = Partners(task, 1, spans)(batch)
    for name in spans:
        assert lengths(partner, name) == lengths(batch, name)
    assert torch.equal(partner.attention_mask, batch.attention_mask)
    assert partner.spans.keys() == {"thing", "place"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_partners_bring_their_own_spans_and_protected_tokens(side: str) -> None:
    task = IOI(padding_side=side, n_means=128)
    batch = task.batch("test", 0, 16)
    prompts = [task.prompt("means", number) for number in range(128)]
    by_tokens = dict(zip(map(tuple, task.encoder.encode([prompt.text for prompt in prompts])), prompts, strict=True))
    for spans in ((), ("IO", "S2")):
        partner = Partners(task, 0, spans)(batch)
        differ = 0
        for row in range(16):
            real = partner.attention_mask[row]
            prompt = by_tokens[tuple(partner.tokens[row, real].tolist())]
            for name, span in prompt.spans.items():
                word = prompt.text[slice(*span)]
                assert task.tokenizer.decode(partner.tokens[row, partner.spans[name][row]]).strip().endswith(word)
            differ += not torch.equal(partner.spans["IO"][row], batch.spans["IO"][row])
            assert partner.protected[row].nonzero().tolist() == real.nonzero()[:1].tolist()
        assert differ > 3


def test_spans_of_equal_length_everywhere_leave_the_partners_as_they_are() -> None:
    task = IOI(n_means=64)  # every name is one token
    batch = task.batch("test", 0, 24)
    plain, spans = (Partners(task, 5, names)(batch) for names in ((), ("IO", "S1", "end", "-1")))
    assert torch.equal(plain.tokens, spans.tokens)


def test_the_batch_s_own_spans_are_not_needed() -> None:
    task = IOI(n_means=64)
    batch = task.batch("test", 0, 8)
    without = dataclasses.replace(batch, spans={})
    assert torch.equal(Partners(task, 0)(without).tokens, Partners(task, 0)(batch).tokens)
    assert Partners(task, 0)(without).spans.keys() == batch.spans.keys()


def test_a_span_that_the_prompts_lack_is_refused() -> None:
    with pytest.raises(TaskError, match=r"no span 'S3' in these prompts\. .*IO, S1, S2"):
        Partners(small_ioi(), 0, ("S3",))(small_ioi().batch("test", 0, 2))


def test_lengths_that_no_prompt_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oa_train.tasks.partners.FURTHER_PROMPTS", 10)
    task = Sentences(n_means=8)
    batch = task.batch("test", 2, 1)
    wide = dataclasses.replace(batch, spans={**batch.spans, "thing": batch.attention_mask & ~batch.protected})
    n, inside = int(wide.lengths), int(wide.spans["thing"].sum())
    message = rf"another prompt of {n} tokens, {inside} of them in the span 'thing', and there is none among 10"
    with pytest.raises(TaskError, match=message):
        Partners(task, 0, ("thing",))(wide)


def test_without_bos_nothing_of_a_partner_is_protected() -> None:
    task = small_ioi(lm=LMSpec(bos="none"))
    assert not Partners(task, 0)(task.batch("test", 0, 4)).protected.any()


def test_prompts_without_a_partner_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sentences of three have lengths of their own among the means."""
    monkeypatch.setattr("oa_train.tasks.partners.FURTHER_PROMPTS", 10)
    task = Sentences(n_means=24)
    assert Partners(task, 0, ("thing",)).why_lacking([task.batch("test", 0, 8)]) is None
    alone = Sentences(n_means=24)
    alone.prompt = lambda stream, index: Prompt(  # type: ignore[method-assign]
        "Then Paul met" + " at the park" * (index % 3 if stream == "test" else 0) + " the ring", (" and",)
    )
    reason = Partners(alone, 0).why_lacking(alone.batches("test", 6))
    # All means are one text, which is the text of the first and the fourth test prompt.
    assert reason is not None
    assert reason.startswith("6 of 6 prompts have no partner")
    assert "their number of tokens (6, 9, 12)" in reason
