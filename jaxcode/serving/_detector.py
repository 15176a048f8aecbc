"""Detects faulty workers of a pool by their answers to a server's requests."""

import logging
import threading
from typing import Any, NamedTuple, final

import jax
import numpy as np
from jaxtyping import Bool, PyTree

from ..pools import Responses
from ..robust import Detection
from ._codec import Codec, EncodedBatch

log = logging.getLogger("jaxcode.serving")


class Examined(NamedTuple):
    """Holds what a defence makes of the answers to a request.

    Attributes:
        detection: The detection; None without a defence.
        trusted: Whose answers are decoded, bool, shape (N,).
        certain: Whose answers are also beyond doubt.
    """

    detection: Detection | None
    trusted: Bool[np.ndarray, "workers"]
    certain: Bool[np.ndarray, "workers"]


@final
class Detector:
    """Examines answers, and keeps the evidence that requests give about each worker of a pool.

    Args:
        codec: Has the defence.
        num_workers: Workers of the pool.
    """

    def __init__(self, codec: Codec, num_workers: int):
        self._codec = codec
        self._evidence: Any = np.zeros(num_workers, np.float32)
        # Workers that the latest request of theirs flagged.
        self._flagged: set[int] = set()
        self._lock = threading.Lock()

    def examine(self, responses: Responses, batch: EncodedBatch) -> Examined:
        """Examines the answers to a request."""
        returned = responses.returned
        if not self._codec.gathers_evidence:
            detection = self._codec.detect(responses.values, returned, batch, None, responses.worker)
        else:
            with self._lock:
                detection = self._codec.detect(responses.values, returned, batch, self._evidence, responses.worker)
                assert detection is not None
                self._evidence = detection.evidence
                self._log_flagged(responses, detection)
        if detection is None:
            return Examined(None, returned, returned)
        trusted = np.asarray(detection.trusted)
        certain = trusted if detection.unresolved is None else trusted & ~np.asarray(detection.unresolved)
        return Examined(detection, trusted, certain)

    def compile(self, values: PyTree[np.ndarray], batch: EncodedBatch) -> None:
        """Compiles for batches like this one, with answers, leaves (N, groups, ...)."""
        nobody = np.zeros(jax.tree.leaves(values)[0].shape[0], bool)
        self._codec.detect(values, nobody, batch, self._evidence, np.full(len(nobody), -1))

    def _log_flagged(self, responses, detection):
        flagged = set(responses.worker[np.asarray(detection.flagged)].tolist())
        for number in sorted(flagged - self._flagged):
            log.warning(
                "worker %d is flagged: its answers are not those that others give or that the prior expects",
                number,
                extra={"worker": number, "kind": "flagged"},
            )
        served = set(responses.worker[responses.returned].tolist())
        self._flagged = (self._flagged - served) | flagged
