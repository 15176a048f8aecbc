"""What pools have in common: shares of a request, what f answers to them, warming up."""

import sys
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from ..checks import batch_size
from .compute import answer_shapes, shapes_of
from .dispatch import AbstractWorker, Dispatcher
from .request import Request
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

    Attributes:
        dispatcher: Who gives them what to do.
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
        self.dispatcher = Dispatcher(workers, examples, stuck_after=stuck_after, start_limit=start_limit)
        with tqdm(total=len(workers), desc="starting workers", disable=not progress, file=sys.stderr) as bar:
            self.dispatcher.start(bar.update)

    def run(self, coded, stop, time_limit, enough, error, order, again_after) -> Responses:
        coded = jax.tree.map(np.asarray, coded)
        shares = batch_size("coded", coded)
        for path, leaf in jax.tree_util.tree_leaves_with_path(coded):
            if leaf.ndim < 2:
                name = f"coded{jax.tree_util.keystr(path)}"
                raise ValueError(f"{name} has shape {leaf.shape}; expected (shares, batch, ...), a batch each")
        order = range(shares) if order is None else order
        if sorted(order) != list(range(shares)):
            raise ValueError(f"order is {order}; expected the numbers of the {shares} shares, each once")
        stop.check(shares, error is not None)
        expected = self._expected(shapes_of(jax.tree.map(lambda leaf: leaf[0], coded)))
        request = Request(coded, expected, order, again_after)
        with self.dispatcher.working_on(request):
            return request.gather(stop, time_limit, enough, error)

    def warm_up(self, example: PyTree) -> None:
        shapes = shapes_of(example)
        self._expected(shapes)
        self.dispatcher.warm_up(shapes)

    def _expected(self, shapes):
        leaves, structure = jax.tree.flatten(shapes)
        key = structure, tuple(leaves)
        if key not in self._known:
            self._known[key] = answer_shapes(self._fn, self._params, shapes)
        return self._known[key]
