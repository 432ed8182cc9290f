"""Which of the cases and baselines a short run takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


class UnknownChoice(ValueError):
    """Nothing has this name; the message says what there is."""


def chosen[T](cases: Iterable[T], only: Sequence[str], name: Callable[[T], str]) -> list[T]:
    """The cases whose names hold one of `only`; all of them if there are none.

    Raises:
        UnknownChoice: one of `only` names nothing.
    """
    cases = list(cases)
    if unknown := [part for part in only if not any(part in name(case) for case in cases)]:
        raise UnknownChoice(f"no case holds {', '.join(unknown)} in its name: there is {', '.join(map(name, cases))}")
    return [case for case in cases if not only or any(part in name(case) for part in only)]


def named[T](offered: dict[str, T], names: Sequence[str]) -> dict[str, T]:
    """Those of these names; all of them if there are none.

    Raises:
        UnknownChoice: there is no such name.
    """
    if unknown := [name for name in names if name not in offered]:
        raise UnknownChoice(f"no baseline {', '.join(unknown)}: there is {', '.join(offered)}")
    return {name: one for name, one in offered.items() if not names or name in names}
