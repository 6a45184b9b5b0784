"""In which settings two recipes differ: of a checkpoint and its run, of a sweep's point and now."""

from __future__ import annotations

from collections.abc import Sequence


def recipe_differences(
    old: object, new: object, may_change: Sequence[str]
) -> list[tuple[str, object, object]]:
    """Dotted keys with other values, and both of them; a list counts as one value.

    Args:
        old: Plain data, as is `new`.
        may_change: Keys that may differ, and with them all below and above.
    """
    before, now = _flat(old), _flat(new)
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not may_differ(key, may_change)
    ]


def may_differ(key: str, may_change: Sequence[str]) -> bool:
    """Whether a dotted key is one of some, lies inside one, or holds one."""
    within = f"{key}."
    return any(
        within.startswith(f"{free}.") or f"{free}.".startswith(within) for free in may_change
    )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
