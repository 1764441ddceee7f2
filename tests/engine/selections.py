"""Selections of units of every kind for tests of the engine."""

from oa_train.models.frozen import CausalLM
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import SITE_KINDS
from tests.builders import random_dictionary

EVERY_KIND = tuple(SITE_KINDS)
SPANNED = "every kind with spans"
SELECTIONS = (*EVERY_KIND, SPANNED)
# The span s must be named by the batch.
PATTERNS = ("m1@s", "m2.n1?@s", "r2@s", "a0@-1", "a2.h1@s", "a2.h1@-1", "f1.3@s", "tokens@s")


def plain_kinds(model: CausalLM) -> list[str]:
    """The kinds of site that a model has by itself: mixtures of experts have no neurons."""
    missing = {"features"} if find_parts(model).down_projections else {"features", "neurons"}
    return [kind for kind in SITE_KINDS if kind not in missing]


def selection(model: CausalLM, name: str) -> Nodes:
    """The units of one kind, or those of every kind with some restricted to spans."""
    dictionaries = [random_dictionary(site, seed=seed) for seed, site in enumerate(("a0", "r1", "m2"))]
    if name == SPANNED:
        return Nodes.of(model.config, EVERY_KIND, PATTERNS, dictionaries)
    return Nodes.of(model.config, [name], (), dictionaries if name == "features" else ())


def every_kind(model: CausalLM) -> Nodes:
    """The units of every kind that the model has, each at all tokens."""
    return Nodes.of(model.config, [*plain_kinds(model), "features"], (), [random_dictionary("r3")])
