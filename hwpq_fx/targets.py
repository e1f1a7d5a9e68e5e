"""Choosing layers by name, in compressed-tensors' three forms: exact, suffix, "re:"."""

import difflib
import re
from collections.abc import Iterable

from .errors import ConfigError


def check_pattern(field: str, pattern: object) -> None:
    """Raise ConfigError where `pattern` is not a non-empty string, or not a regular expression after "re:"."""
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{field}: {pattern!r} is not a name, a suffix or a 're:' expression")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's name is meant: equal, a suffix at a dot, or matched by the expression after "re:"."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)


def check_all_match(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ConfigError for a pattern that matches no name: a misspelt one would silently do nothing."""
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            # a suffix is compared with suffixes of its own length
            parts = pattern.count(".") + 1
            known = names + [".".join(name.split(".")[-parts:]) for name in names]
            near = difflib.get_close_matches(pattern, dict.fromkeys(known), n=3, cutoff=0.5)
            hint = f"close: {', '.join(near)}" if near else f"layers are named like {', '.join(names[:3])}"
            raise ConfigError(f"{field}: {pattern!r} matches no layer of this model ({hint})")
