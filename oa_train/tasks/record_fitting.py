"""Fits records to a tokenizer: extends every prompt so that each scored answer is a single token."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from oa_train.errors import TaskError
from oa_train.tasks.encoding import PromptEncoder, Span
from oa_train.tasks.file_formats import RowError, shared_length, shorten
from oa_train.tasks.record_reading import Record
from oa_train.tasks.task import AnswerPositions, Prompt, Question


@dataclass(frozen=True)
class RecordFitter:
    """Fits records to a tokenizer: extends prompts, if necessary, so that each scored answer is a single token."""

    encoder: PromptEncoder
    answer_positions: AnswerPositions
    several: list[str] = field(default_factory=list)
    overlapping: list[str] = field(default_factory=list)

    def remarks(self, n_prompts: int) -> Iterator[str]:
        """Remarks on how answers of several tokens are scored."""
        if self.several:
            at = (
                "each of them"
                if self.answer_positions == "every"
                else "the first that differs from the wrong answer's"
            )
            count = f"{len(self.several)} of {n_prompts} prompts have answers of several tokens"
            yield f"{count}, scored at {at}: {self.several[0]}."
        if self.overlapping:
            count = f"In {len(self.overlapping)} of {n_prompts} prompts"
            yield f"{count} a token begins answers and wrong answers, and counts as neither: {self.overlapping[0]}."

    def fit(self, records: Sequence[Record], problems: list[tuple[str, RowError]]) -> list[Record]:
        """The records that can be used; the others are added to `problems`."""
        fitted = []
        uneven = self._uneven(records)
        for record in records:
            try:
                if id(record) in uneven:
                    raise uneven[id(record)]
                fitted.append(replace(record, prompt=self._prompt(record.prompt)))
            except (RowError, TaskError) as problem:
                error = problem if isinstance(problem, RowError) else RowError("not for this tokenizer", str(problem))
                problems.append((record.place, error))
        return fitted

    @staticmethod
    def _uneven(records: Sequence[Record]) -> dict[int, RowError]:
        """Errors of records that lack a field which most records have, or have one which most lack; by `id`."""
        uneven: dict[int, RowError] = {}
        parts = {
            "counterfactual": lambda prompt: prompt.counterfactual is not None,
            "wrong_answer": lambda prompt: bool(prompt.distractors),
            "spans": lambda prompt: tuple(sorted(prompt.spans)),
        }
        for name, of in parts.items():
            states: Counter[object] = Counter(of(record.prompt) for record in records)
            if len(states) < 2:
                continue
            usual, count = states.most_common(1)[0]
            for record in records:
                state = of(record.prompt)
                if state != usual:
                    shown: dict[object, str] = {True: "one", False: "none"}
                    detail = f"{shown.get(state, state)}, and {count} of {len(records)} have {shown.get(usual, usual)}"
                    error = RowError(f"`{name}` is not as in other rows", f"{detail}: {shorten(record.prompt.text)}")
                    uneven.setdefault(id(record), error)
        return uneven

    def _prompt(self, prompt: Prompt) -> Prompt:
        text = prompt.text
        begun = self.encoder.encode([text])[0]
        longest = self.encoder.context_length
        if longest is not None and len(begun) >= longest:
            detail = f"{len(begun)} tokens, and the model has {longest} positions: {shorten(text)}"
            raise RowError("a prompt longer than the model's context", detail)
        tails = _tails(self.encoder, text, begun, (*prompt.answers, *prompt.distractors))
        right, wrong = tails[: len(prompt.answers)], tails[len(prompt.answers) :]
        shared = shared_length([tail.ids for tail in tails]) if wrong else 0
        # A token that is only a space counts to the prompt, not to the answer.
        while shared < min(len(tail.ids) for tail in tails) - 1 and all(
            not tail.pieces[shared].strip() for tail in tails
        ):
            shared += 1
        if self.answer_positions == "every" and max(len(tail.ids) for tail in right) > 1:
            if len(right) > 1:
                raise RowError("answer_positions: every needs a single answer", shorten(list(prompt.answers)))
            return self._every(prompt, right[0], wrong)
        return self._first(prompt, right, wrong, shared)

    def _first(self, prompt: Prompt, right: Sequence["_Tail"], wrong: Sequence["_Tail"], shared: int) -> Prompt:
        """The prompt up to the first token in which answers differ from wrong ones."""
        ended = [tail for tail in (*right, *wrong) if len(tail.ids) <= shared]
        if ended:
            detail = f"{list(prompt.answers)} and {list(prompt.distractors)} after {shorten(prompt.text)}"
            raise RowError("an answer that a wrong answer begins with, or the reverse", detail)
        answers = dict.fromkeys(tail.pieces[shared] for tail in right)
        distractors = dict.fromkeys(tail.pieces[shared] for tail in wrong)
        both = [piece for piece in answers if piece in distractors]
        kept = tuple(piece for piece in answers if piece not in both)
        rest = tuple(piece for piece in distractors if piece not in both)
        if not kept or (wrong and not rest):
            raise RowError(
                "answers and wrong answers begin with the same token", f"{both} after {shorten(prompt.text)}"
            )
        final = self._extended(prompt, "".join(right[0].pieces[:shared]), kept, rest)
        self._check(final)
        if any(len(tail.ids) > 1 for tail in right):
            self.several.append(f"{prompt.answers[0]!r} by {kept[0]!r} after {shorten(final.text, 60)}")
        if both:
            self.overlapping.append(f"{both[0]!r} after {shorten(prompt.text, 60)}")
        return final

    def _every(self, prompt: Prompt, right: "_Tail", wrong: Sequence["_Tail"]) -> Prompt:
        """The prompt up to the last token of its answer, with a question at each token before."""
        questions = []
        for place, (piece, following) in enumerate(zip(right.pieces, (*right.pieces[1:], None), strict=True)):
            if not "".join(right.pieces[: place + 1]).strip():
                continue  # a token that is only a space counts to the prompt
            if "" in (piece, following):
                continue  # part of a character, such as one of the two bytes of "é", cannot be an answer
            rivals = [tail for tail in wrong if tail.ids[:place] == right.ids[:place] and len(tail.ids) > place]
            others = dict.fromkeys(tail.pieces[place] for tail in rivals if tail.ids[place] != right.ids[place])
            questions.append(Question(prompt.text + "".join(right.pieces[:place]), (piece,), tuple(others)))
        if not questions:
            raise RowError("an answer of which no token is whole characters", f"{right.ids} for {prompt.answers[0]!r}")
        *earlier, last = questions
        extended = self._extended(prompt, last.text.removeprefix(prompt.text), last.answers, last.distractors)
        final = replace(extended, earlier=(*prompt.earlier, *earlier))
        self._check(final)
        scored = ", ".join(repr(question.answers[0]) for question in questions)
        self.several.append(f"{prompt.answers[0]!r} as {scored}")
        return final

    def _extended(self, prompt: Prompt, more: str, answers: tuple[str, ...], distractors: tuple[str, ...]) -> Prompt:
        other = prompt.counterfactual
        spans: dict[str, Span] = dict(prompt.spans)
        if more:
            for name, span in spans.items():
                start = prompt.text.find(span) if isinstance(span, str) else -1
                if isinstance(span, str) and prompt.text.count(span) == 1 and (prompt.text + more).count(span) > 1:
                    spans[name] = (start, start + len(span))
        return replace(
            prompt,
            text=prompt.text + more,
            answers=answers,
            distractors=distractors,
            counterfactual=None if other is None else other + more,
            spans=spans,
        )

    def _check(self, prompt: Prompt) -> None:
        """Raise a `RowError` if a prompt cannot be put into a batch."""
        for question in (*prompt.earlier, prompt):
            for piece in (*question.answers, *question.distractors):
                if self.encoder.continuation(question.text, piece) is None:
                    detail = f"{piece!r} after {shorten(question.text)} is not a token of this tokenizer"
                    raise RowError("an answer that does not continue its prompt", detail)
        if prompt.counterfactual is not None:
            row, other = self.encoder.encode([prompt.text, prompt.counterfactual])
            if len(row) != len(other):
                detail = (
                    f"{len(other)} tokens in {shorten(prompt.counterfactual)}, {len(row)} in {shorten(prompt.text)}"
                )
                raise RowError("the counterfactual has another number of tokens than its prompt", detail)
        try:
            self.encoder.span_flags([prompt.text], [prompt.spans])
        except TaskError as problem:
            reason = str(problem).partition("; expected")[0].partition(". Let it cover")[0]
            raise RowError("a span that cannot be used", reason) from None


@dataclass(frozen=True)
class _Tail:
    """An answer: ids of the tokens that continue the prompt, and the text of each."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]


def _tails(encoder: PromptEncoder, text: str, begun: list[int], answers: Sequence[str]) -> list[_Tail]:
    """The answers to a prompt whose ids are `begun`."""
    tails = []
    wholes = [text + answer for answer in answers]
    for answer, whole, (ids, places) in zip(answers, wholes, encoder.encode_with_places(wholes), strict=True):
        if ids[: len(begun)] != begun or len(ids) == len(begun):
            detail = f"{shorten(answer)} after {shorten(text)} changes the prompt's last token"
            raise RowError("an answer that does not continue its prompt", detail)
        if encoder.tokenizer.unk_token_id in ids[len(begun) :]:
            detail = f"{shorten(answer)} after {shorten(text)}"
            raise RowError("an answer with a word that this tokenizer does not know", detail)
        bounds = [len(text), *(end for _, end in places[len(begun) :])]
        pieces = tuple(whole[start:end] for start, end in itertools.pairwise(bounds))
        tails.append(_Tail(tuple(ids[len(begun) :]), pieces))
    return tails
