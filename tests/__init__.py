"""Tests mirror the package path for path."""

# Named in pyproject.toml, where it is looked up as an attribute.
from tests import typechecking as typechecking
