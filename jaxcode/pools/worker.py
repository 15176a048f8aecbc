"""Defines the interface of workers, to be implemented for a new kind."""

import abc
from collections.abc import Sequence
from concurrent.futures import Future

import jax
import numpy as np
from jaxtyping import PyTree

from .supervisor import AbstractProcess


class AbstractWorker(AbstractProcess):
    """Computes the model on batches; called on the host. No method blocks but `join`."""

    @abc.abstractmethod
    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> Future:
        """Compiles for batches of these shapes.

        Returns:
            A future that is done when all are compiled; with no examples, when the worker is running. It raises
            `WorkerDied` where the worker is dead, else what compiling or running the model raised.
        """

    @abc.abstractmethod
    def call(self, batch: PyTree[np.ndarray]) -> Future:
        """Computes the model on a batch.

        Returns:
            A future of the answers, NumPy arrays. It raises `WorkerDied` where the worker is dead, else what the model
            raised.
        """
