"""HSTU layers under other codes' names: where a state dict keeps them, and one stacked array per weight of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flame_jax.models.params import misfits


class Sizes(NamedTuple):
    """Sizes of a layer: heads, a head's queries and keys (dqk), a head's values (dv)."""

    heads: int
    attention_dim: int
    hidden_dim: int

    @property
    def values(self) -> int:
        """All heads' values."""
        return self.heads * self.hidden_dim

    @property
    def mixed(self) -> int:
        """Columns of the projection to u, v, q and k."""
        return 2 * self.heads * (self.hidden_dim + self.attention_dim)


class Spelling(NamedTuple):
    """One way a layer's tensor is stored.

    Attributes:
        name: within the layer.
        shape: of theirs.
        transposed: theirs is the transpose of ours.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


Spellings = Mapping[str, Sequence[Spelling]]
"""Our weight's name -> the ways it may be stored, of which a layer has one."""


class Layers(NamedTuple):
    """What was found of a stack.

    Attributes:
        depth: number of layers.
        weights: our name without `layers/` -> float32[depth, ...]; empty when there are problems.
        names: the tensors that have a place in the stack, right or wrong.
        problems: everything that keeps it from being read, in words.
    """

    depth: int
    weights: dict[str, np.ndarray]
    names: set[str]
    problems: list[str]


@dataclass(frozen=True)
class PublicStack:
    """How a public code stores a stack of HSTU layers: `<any prefix><folder>.<number>.<name>`.

    Attributes:
        title: what errors call it.
        folder: name of the list of layers.
        spell: the tensors of one layer, given its sizes and the model's width.
    """

    title: str
    folder: str
    spell: Callable[[Sizes, int], Spellings]

    def layers(self, state: Mapping[str, np.ndarray], sizes: Sizes) -> dict[str, np.ndarray]:
        """Our name -> float32[depth, ...] of a state that holds a stack and nothing else.

        Raises:
            ValueError: naming every missing, extra and misshapen tensor.
        """
        found = self.read(state, sizes)
        if problems := found.problems + [f"extra {name}" for name in state if name not in found.names]:
            raise ValueError(f"not {self.title} of these sizes: " + "; ".join(problems))
        return found.weights

    def read(
        self, state: Mapping[str, np.ndarray], sizes: Sizes, width: int | None = None, skip: Collection[str] = ()
    ) -> Layers:
        """Find the stack among a state's tensors and stack its layers.

        Args:
            width: the model's; None takes it from the norm at the layers' input.
            skip: weights of ours that the state is not to have.
        """
        stacks = self._stacks(state)
        names = {name for name in state if self._pattern().match(name)}
        if len(stacks) > 1:
            where = " and ".join(f"{prefix}{self.folder}" for prefix in sorted(stacks))
            return Layers(0, {}, names, [f"{len(stacks)} stacks of layers, at {where}"])
        prefix, numbers = next(iter(stacks.items()), ("", []))
        depth = len(numbers)
        if numbers != list(range(depth)) or not depth:
            return Layers(0, {}, names, [f"no {prefix}{self.folder}.0 to .N - 1 in the state, but {numbers}"])
        places = [f"{prefix}{self.folder}.{number}." for number in numbers]
        if width is None:
            width = _width(state, places, self.spell(sizes, 0))
        spellings = {ours: spelt for ours, spelt in self.spell(sizes, width).items() if ours not in skip}
        return _stack(state, places, spellings)

    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"((?:.*\.)?){re.escape(self.folder)}\.(0|[1-9][0-9]*)\.")

    def _stacks(self, state: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
        """Prefix -> sorted numbers of the layers found under it."""
        found: dict[str, set[int]] = {}
        for name in state:
            if match := self._pattern().match(name):
                found.setdefault(match[1], set()).add(int(match[2]))
        return {prefix: sorted(numbers) for prefix, numbers in found.items()}


def _width(state: Mapping[str, np.ndarray], places: Sequence[str], spellings: Spellings) -> int:
    """Size of the first input norm there is; 0 without one, which is reported as missing then."""
    for place in places:
        for spelling in spellings["input_scale"]:
            tensor = state.get(place + spelling.name)
            if tensor is not None and tensor.ndim:
                return int(tensor.shape[0])
    return 0


def _stack(state: Mapping[str, np.ndarray], places: Sequence[str], spellings: Spellings) -> Layers:
    """Every layer's tensors, in whichever of their spellings they are there."""
    problems: list[str] = []
    expected: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[np.ndarray]] = {ours: [] for ours in spellings}
    for place in places:
        for ours, spelt in spellings.items():
            there = [s for s in spelt if place + s.name in state]
            expected |= {place + s.name: s.shape for s in there}
            if not there:
                problems.append("missing " + " or ".join(place + s.name for s in spelt))
            if len(there) > 1:
                problems.append("both " + " and ".join(place + s.name for s in there))
            for s in there[:1]:
                value = np.asarray(state[place + s.name], np.float32)
                pieces[ours].append(value.T if s.transposed else value)
    problems += misfits(expected, {name: state[name] for name in expected})
    weights = {} if problems else {ours: np.stack(layers) for ours, layers in pieces.items()}
    return Layers(len(places), weights, set(expected), problems)
