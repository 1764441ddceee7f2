"""Induction that ignores case, with a backup head, in a GPT-2 of 4 layers and 3 heads (309 edges): "b F a C f" -> "a".

The backup head copies what the primary head copies, but only where the primary head has written nothing. So ablating
either changes next to nothing, provided that the primary head's replacement writes nothing too (zeros, trained
constants or its mean, but not its value on another prompt), and ablating both destroys the behaviour.
"""

from oa_train.seeds import torch_generator
from oa_train.zoo.known.case_induction import N_POSITIONS, CaseInduction
from oa_train.zoo.known.families import gpt2
from oa_train.zoo.known.model import BOTH_CASES, LETTERS, KnownModel
from oa_train.zoo.known.parts import add_decoder, add_distractors, add_letters
from oa_train.zoo.known.wiring import Wiring, subspaces

PRIMARY, BACKUP = "a2.h0", "a3.h0"

EDGES = (
    "input->m0",
    "input->a1.h0<q>",
    "input->a1.h0<k>",
    "m0->a1.h0<v>",
    "m0->a2.h0<q>",
    "a1.h0->a2.h0<k>",
    "input->a2.h0<v>",
    "a2.h0->m3",
    "m3->logits",
)

ROLES = {
    "m0": "writes the letter of each word, whatever its case",
    "a1.h0": "copies the letter of the word before",
    "a2.h0": "attends to the word that followed the same letter before, or to the BOS if there is none, and copies it",
    "a3.h0": "does the same where a2.h0 has written nothing, and attends to the BOS where it has: a backup",
    "m3": "turns the word into its lower case",
    "a0.h0, m1": "each write a constant that m3 relies on",
    "a1.h1": "writes a sign, of which m2 takes the absolute value; m3 relies on that too",
    "a2.h2, a3.h2": "cancel each other",
    "a2.h1, a3.h1": "attend like a2.h0, and write where nothing reads",
    "the others": "attend at random and write where nothing reads, as units of each MLP do",
}


class BackupInduction(CaseInduction):
    """A row of different letters in any case, then one of them again; the answer is the letter that followed it.

    The prompts are those of `CaseInduction`.
    """

    name = "backup_induction"


def build_backup_induction(seed: int = 0) -> KnownModel:
    """Write the model; `seed` determines its distractors."""
    n = len(LETTERS)
    spaces = subspaces(96, token=2 * n, position=N_POSITIONS, letter=n, before=n, answer=2 * n, output=n)
    model = gpt2(96, BOTH_CASES, n_layers=4, n_heads=3, n_units=48, n_positions=N_POSITIONS)
    wiring = Wiring(model, spaces, BOTH_CASES, LETTERS, torch_generator("known backup induction", seed))
    add_letters(wiring, 0)
    wiring.copy(1, 0, "letter", "before", back=1)
    for layer, hushed_by in ((2, None), (3, "answer")):
        wiring.match(layer, 0, [("letter", "before")])
        wiring.rest_on_first(layer, 0, hushed_by)
        wiring.copy(layer, 0, "token", "answer")
        # It does the same, and writes where nothing reads.
        wiring.copy(layer, 1, "token", "rest", where=[("letter", "before")])
    add_decoder(wiring, 3)
    add_distractors(
        wiring,
        constant_head=(0, 0),
        constant_unit=1,
        sign_head=(1, 1),
        absolute_units=2,
        cancelling_heads=((2, 2), (3, 2)),
    )
    return KnownModel(BackupInduction, wiring.finish(), EDGES, ROLES)
