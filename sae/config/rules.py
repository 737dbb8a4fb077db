"""The project's form of refusing a setting: what must hold; what was given; what to do."""

from __future__ import annotations


def require(condition: bool, field_name: str, rule: str, given: object, do: str) -> None:
    """Raise the project's form of error: what must hold; what was given; what to do."""
    if not condition:
        raise ValueError(f"`{field_name}` {rule}; got {given!r}. {do}")


def require_positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            value is None or value > 0,
            f"{section}.{name}",
            "must be positive",
            value,
            "Give a positive value or leave it out.",
        )


def require_not_negative(section: str, config: object, do: str, *names: str) -> None:
    """Refuse negative values of the settings `names`; None is none."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 0, f"{section}.{name}", "must not be negative", value, do)
