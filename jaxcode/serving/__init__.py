"""Serves predictions from whichever workers answer: the server in this process, its metrics, and an HTTP server.

`python -m jaxcode.serving` serves a model over HTTP, see `jaxcode.serving.http`.
"""

from ._queue import QueueFull as QueueFull
from .server import CodedServer as CodedServer
from .server import Prediction as Prediction

__all__ = ["CodedServer", "Prediction", "QueueFull"]
