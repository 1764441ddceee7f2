"""Pairs of subjects whose facts differ, so that each can replace the other in counterfactual prompts."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from oa_train.seeds import derive_seed
from oa_train.tasks.encoding import CONTEXT, PromptEncoder
from oa_train.tasks.file_formats import shared_length

# The right objects of a subject, by relation.
Objects = Mapping[str, Sequence[str]]


def pair_subjects(encoder: PromptEncoder, facts: Mapping[str, Objects]) -> dict[str, str]:
    """Partner of each subject: one with as many tokens, whose objects begin with other tokens in every relation.

    Both subjects of a pair have facts of the same relations. Pairs are mutual, except for the last of an odd number of
    subjects, whose partner has another partner. Subjects without a possible partner are left out.

    Args:
        encoder: encoder of the model that the prompts are for.
        facts: objects of each subject.
    """
    tokens_of = {subject: _word_tokens(encoder, _names(objects)) for subject, objects in facts.items()}
    # Some tokenizers have a token for the space before a word.
    space = shared_length([tokens for rows in tokens_of.values() for tokens in rows])
    firsts: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for subject, objects in facts.items():
        rows = iter(tokens_of[subject])
        firsts[subject] = {
            relation: {tuple(next(rows)[: space + 1]) for _ in names} for relation, names in objects.items()
        }

    def differ(subject: str, other: str) -> bool:
        own, others = firsts[subject], firsts[other]
        return own.keys() == others.keys() and not any(own[relation] & others[relation] for relation in own)

    by_length: dict[int, list[str]] = defaultdict(list)
    for subject, tokens in zip(facts, _word_tokens(encoder, facts), strict=True):
        by_length[len(tokens)].append(subject)
    partners: dict[str, str] = {}
    for subjects in by_length.values():
        waiting = sorted(subjects, key=lambda subject: derive_seed("partner", subject))
        while waiting:
            subject = waiting.pop()
            other = next((other for other in (*waiting, *subjects) if differ(subject, other)), None)
            if other in waiting:
                waiting.remove(other)
                partners[other] = subject
            if other is not None:
                partners[subject] = other
    return partners


def pair_name(partners: Mapping[str, str], subject: str) -> str:
    """Name of a pair: the same for two paired subjects, and for a third one whose partner is one of them."""
    other = partners[subject]
    return min(other, partners[other])


def _names(objects: Objects) -> list[str]:
    return [name for names in objects.values() for name in names]


def _word_tokens(encoder: PromptEncoder, words: Iterable[str]) -> list[list[int]]:
    """Tokens of each word when it follows another word."""
    before, *rows = encoder.encode([CONTEXT, *(f"{CONTEXT} {word}" for word in words)])
    return [row[len(before) :] for row in rows]
