"""The loop over a request's keys, with tensor cores and other units kept busy at once.

The work is a sequence of items: every step's keys, and of each step every head of the thread block. While the weights
of an item are made from its scores, the scores of the next item are computed, and the values of the last one are mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import FULL, TILE, per_row
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Barriers, Form, Job, Memory
from flame_jax.pallas_kernels.sumi_attention.mosaic_step import bias_of, hidden_pairs, logits_of, logs_of, weigh

State = tuple[tuple[Any, ...], ...]
"""Of every head: mixed values, and for softmax the largest logit and the sum of weights."""


@dataclass(frozen=True, eq=False)
class Loop:
    """One warpgroup's 64 query rows against all keys of their request.

    Attributes:
        group: the warpgroup.
        begin: position of its first row in the history.
        done: steps of the jobs before.
        factors: of every head, see `mosaic_body`.
    """

    job: Job
    group: jax.Array
    begin: jax.Array
    done: jax.Array
    factors: list[list[Any]]
    memory: Memory
    barriers: Barriers
    form: Form

    def attend(self, state: State) -> State:
        """The state after all steps, of which there is at least one."""
        if self.form.biased or self.form.causal:
            return lax.cond(self.job.is_history, partial(self._all_steps, True), partial(self._all_steps, False), state)
        return self._all_steps(False, state)

    def _all_steps(self, history: bool, state: State) -> State:
        form, job, last = self.form, self.job, self.form.together - 1
        whole = lax.div(job.length, form.tiling.keys)
        if form.causal and history:
            whole = jnp.minimum(whole, lax.div(self.begin, form.tiling.keys))
        self._await_keys(jnp.int32(0))
        scores = _product(*self._scores((jnp.int32(0), 0)))
        # The first item has none before it: weights of 0, of values that are there.
        weights = plgpu.layout_cast(jnp.zeros((TILE, form.tiling.keys), form.dtype), FULL)
        carry = state, scores, weights
        carry = lax.fori_loop(0, whole, partial(self._step, history, False), carry)
        carry = lax.fori_loop(whole, job.steps, partial(self._step, history, True), carry)
        state, _, weights = carry
        mixed = self._mix((job.steps - 1, last), state[last][0], weights)
        self._give_back_values(job.steps - 1)
        return (*state[:last], (mixed, *state[last][1:]))

    def _step(self, history: bool, masked: bool, number: jax.Array, carry: Any) -> Any:
        """Take one step's keys in; masked where some may be hidden."""
        state, scores, weights = carry
        form, heads, key = self.form, list(state), number * self.form.tiling.keys
        plgpu.barrier_wait(self.barriers.v_ready.at[self._slot(number)])
        hidden = hidden_pairs(self.job.length, self.begin, key, form, history) if masked else None

        def weigh_head(i: int, scores: jax.Array, biases: list[Any]) -> Any:
            if form.biased and not biases:
                logs = logs_of(self.begin - key, self.group, self._slot(number), self.memory, form, history)
                biases = [bias_of(logs, factors) for factors in self.factors]
            logits = logits_of(scores, self.factors[i][0], biases[i] if biases else None)
            return *weigh(logits, hidden, heads[i][1:], form), biases

        biases: list[Any] = []

        for i in range(form.together):
            following, before = (i + 1) % form.together, (i - 1) % form.together
            if not following:
                self._await_keys(number + 1)
            scores, mixed, (made, decay, running, biases) = self._while_multiplying(
                (number if following else number + 1, following),
                (number if i else jnp.maximum(number - 1, 0), before),
                (heads[before][0], weights),
                partial(weigh_head, i, scores, biases),
            )
            heads[before] = (mixed, *heads[before][1:])
            weights, mixed = made, heads[i][0]
            heads[i] = (mixed if decay is None else mixed * per_row(decay, mixed), *running)
            if not i:
                self._give_back_values(number - 1)
            if i == max(0, form.together - 2):  # the step's last scores are there, and its bias, too
                plgpu.barrier_arrive(self.barriers.k_free.at[self._slot(number)])
        return tuple(heads), scores, weights

    def _await_keys(self, number: jax.Array) -> None:
        """Of a step, if there is one of this number."""

        @pl.when(number < self.job.steps)
        def _() -> None:
            plgpu.barrier_wait(self.barriers.k_ready.at[self._slot(number)])

    def _give_back_values(self, number: jax.Array) -> None:
        """Of a step, if there is one of this number."""

        @pl.when(number >= 0)
        def _() -> None:
            plgpu.barrier_arrive(self.barriers.v_free.at[self._slot(number)])

    def _slot(self, number: jax.Array) -> jax.Array:
        return lax.rem(self.done + number, self.form.tiling.stages)

    def _scores(self, item: tuple[jax.Array, int]) -> tuple[Any, Any]:
        """The operands of an item's scores."""
        number, head = item
        return self.memory.q.at[self.group, head], self.memory.k.at[self._slot(number), head].T

    def _values(self, item: tuple[jax.Array, int]) -> Any:
        number, head = item
        return self.memory.v.at[self._slot(number), head]

    def _while_multiplying(
        self,
        following: tuple[jax.Array, int],
        before: tuple[jax.Array, int],
        state: tuple[jax.Array, jax.Array],
        do: Callable[[], Any],
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Scores of the following item, mixed values with those of the item before, and what `do` gives meanwhile.

        Products start before `do`: ptxas makes all products wait for one another where registers that one of them
        reads are written while another is under way.
        """
        mixed, weights = state
        if self.form.interpret:
            return _product(*self._scores(following)), self._mix(before, mixed, weights), do()

        def scope(scores: Any, accumulator: Any) -> tuple[jax.Array, jax.Array, Any]:
            accumulator[...] = mixed
            plgpu.wgmma(scores, *self._scores(following))
            plgpu.wgmma(accumulator, weights, self._values(before))
            done = do()
            return scores[...], accumulator[...], done

        shapes = ((TILE, self.form.tiling.keys), mixed.shape)
        return pl.run_scoped(scope, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def _mix(self, item: tuple[jax.Array, int], mixed: jax.Array, weights: jax.Array) -> jax.Array:
        """Add an item's weighted values to what was mixed so far."""
        if self.form.interpret:  # it takes both operands from shared memory only
            staging = self.memory.weights.at[self.group]
            staging[...] = weights
            plgpu.commit_smem()
            return mixed + _product(staging, self._values(item))

        def scope(accumulator: Any) -> jax.Array:
            accumulator[...] = mixed
            plgpu.wgmma(accumulator, weights, self._values(item))
            return accumulator[...]

        return pl.run_scoped(scope, plgpu.ACC(mixed.shape, jnp.float32))


def _product(a: Any, b: Any) -> jax.Array:
    def scope(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(scope, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
