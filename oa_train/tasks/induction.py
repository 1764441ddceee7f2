"""Induction: a row of unrelated words, then one of them again; what follows is what followed it before."""

import random
from typing import Any

from oa_train.errors import ConfigurationError
from oa_train.models.loading import BUILT_IN, LMSpec
from oa_train.seeds import derive_seed
from oa_train.tasks.base import Prompt, Task
from oa_train.tasks.tokens import PaddingSide
from oa_train.tasks.vocabulary import single_token_words

# Some text must stand before the first word: tokenizers write the very first word of a prompt differently.
OPENING = "Words:"


class Induction(Task):
    """A pair of words that comes back.

    In "Words: river stone cloud window stone" the answer is " cloud", the word that followed "stone" before;
    distractors are the other words of the row. The counterfactual has another word at the first "stone", so that
    nothing tells what follows the last one.

    Args:
        lm: the model whose tokenizer encodes the prompts; the built-in model by default.
        length: different words in the row, before the one that comes back.
        seed: other seeds give other prompts.
        batch_size: prompts in a training batch.
        batches_per_epoch: training batches between two validations.
        n_validation: prompts that validation uses.
        n_test: prompts that the final evaluation uses.
        n_means: prompts over which mean ablation averages.
        padding_side: where shorter prompts of a batch are filled up.

    Attributes:
        words: words that are single tokens.
    """

    name = "induction"

    def __init__(
        self,
        *,
        lm: LMSpec = BUILT_IN,
        length: int = 8,
        seed: int = 0,
        batch_size: int = 16,
        batches_per_epoch: int = 50,
        n_validation: int = 512,
        n_test: int = 2048,
        n_means: int = 2048,
        padding_side: PaddingSide = "right",
    ) -> None:
        if length < 3:
            raise ConfigurationError(f"length is {length}; expected at least 3 words: a pair and one other.")
        super().__init__(
            lm=lm,
            seed=seed,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            n_validation=n_validation,
            n_test=n_test,
            n_means=n_means,
            padding_side=padding_side,
        )
        self.length = length
        # One word more than the row holds, for the counterfactual.
        self.words = single_token_words(self.encoder, self.name, "induction", minimum=length + 1)

    def draw(self, random: random.Random) -> Prompt:
        """Draw the words and which of them comes back."""
        *row, replacement = random.sample(self.words, self.length + 1)
        place = random.randrange(self.length - 1)  # the last word of the row has no word after it
        repeated, answer = row[place : place + 2]
        changed = [*row[:place], replacement, *row[place + 1 :]]
        return Prompt(
            text=" ".join([OPENING, *row, repeated]),
            answers=(f" {answer}",),
            distractors=tuple(f" {word}" for word in row if word not in (repeated, answer)),
            counterfactual=" ".join([OPENING, *changed, repeated]),
        )

    def describe(self) -> dict[str, Any]:
        """Everything that decides which prompts are drawn, as plain values for the header of an artefact."""
        return {**super().describe(), "length": self.length, "words": f"{derive_seed(*self.words):016x}"}
