"""What pools have in common: shares of a request, what f answers to them, warming up."""

import sys
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from .. import stop as stop_policies
from .._checks import check_mask
from .compute import answer_shapes, shapes_of
from .dispatch import AbstractWorker, Dispatcher
from .responses import Responses


class Host:
    """Workers of one model, started.

    Args:
        fn: The model, a pure function of params and a batch.
        params: Its parameters.
        workers: Not started yet.
        example: A batch for one worker to compile for, or None.
        stuck_after: As for `Dispatcher`.
        start_limit: As for `Dispatcher`.
        progress: Whether to show how many have started.
    """

    def __init__(
        self,
        fn,
        params,
        workers: Sequence[AbstractWorker],
        example,
        *,
        stuck_after=None,
        start_limit=300.0,
        progress=False,
    ):
        self._fn, self._params = fn, params
        self._known = {}
        examples = [] if example is None else [shapes_of(example)]
        for shapes in examples:
            self._expected(shapes)
        self._dispatcher = Dispatcher(workers, stuck_after=stuck_after, start_limit=start_limit)
        with tqdm(total=len(workers), desc="starting workers", disable=not progress, file=sys.stderr) as bar:
            self._dispatcher.start(examples, lambda: bar.update())

    def run(self, coded, stop, time_limit, enough, error, only=None) -> Responses:
        n = len(self.states())
        only = np.ones(n, bool) if only is None else only
        check_mask("only", only, n)
        coded = jax.tree.map(np.asarray, coded)
        for path, leaf in jax.tree_util.tree_leaves_with_path(coded):
            if leaf.ndim < 2 or leaf.shape[0] != n:
                name = f"coded{jax.tree_util.keystr(path)}"
                raise ValueError(f"{name} has shape {leaf.shape}; expected ({n}, batch, ...), a batch for each worker")
        stop.check(int(only.sum()), error is not None)
        one = shapes_of(jax.tree.map(lambda leaf: leaf[0], coded))
        return self._dispatcher.run(coded, self._expected(one), only, stop, time_limit, enough, error)

    def warm_up(self, example: PyTree) -> None:
        shapes = shapes_of(example)
        self._expected(shapes)
        self._dispatcher.add_example(shapes)
        n = len(self.states())
        zeros = jax.tree.map(lambda leaf: np.zeros((n, *leaf.shape), leaf.dtype), shapes)
        self.run(zeros, stop_policies.answers(n), 300.0, lambda returned: True, None)

    def states(self) -> list[str]:
        return self._dispatcher.states()

    def counters(self) -> dict[str, int]:
        return self._dispatcher.counters()

    def close(self) -> None:
        self._dispatcher.close()

    def _expected(self, shapes):
        leaves, structure = jax.tree.flatten(shapes)
        key = structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._known:
            self._known[key] = answer_shapes(self._fn, self._params, shapes)
        return self._known[key]
