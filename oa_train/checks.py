"""Checks of options, each with the same wording everywhere."""

from collections.abc import Collection

from oa_train.errors import ConfigurationError, suggestion


def check_at_least(least: float, **options: float | None) -> None:
    """Check that options are at least `least`; None is allowed.

    Raises:
        ConfigurationError: an option is less, or NaN.
    """
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ConfigurationError(f"{name} is {value}; expected at least {least:g}.")


def check_positive(**options: float | None) -> None:
    """Check that options are more than 0; None is allowed.

    Raises:
        ConfigurationError: an option is not more than 0.
    """
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ConfigurationError(f"{name} is {value}; expected more than 0.")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Check that a value is one of the choices.

    Raises:
        ConfigurationError: it is not; the message names all choices, and the nearest ones.
    """
    if value not in choices:
        near = suggestion(str(value), choices)
        raise ConfigurationError(f"{name} is {value!r}; expected one of {', '.join(choices)}. {near}".rstrip())
