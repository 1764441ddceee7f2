"""Checks of options, each with one wording."""

from collections.abc import Sequence

from oa_train.errors import ConfigurationError


def check_at_least(least: float, **options: float | None) -> None:
    """Check that numbers are at least `least`; None is no number.

    Raises:
        ConfigurationError: an option is less, or NaN.
    """
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ConfigurationError(f"{name} is {value}; expected at least {least:g}.")


def check_positive(**options: float | None) -> None:
    """Check that numbers are more than 0; None is no number.

    Raises:
        ConfigurationError: an option is not.
    """
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ConfigurationError(f"{name} is {value}; expected more than 0.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ConfigurationError unless a value is one of `choices`."""
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
