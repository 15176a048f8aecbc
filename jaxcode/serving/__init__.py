"""Answers to batches from whichever workers reply: the server in this process, its metrics, and a front for HTTP.

`python -m jaxcode.serving` serves a model over HTTP, see `jaxcode.serving.http`.
"""

from ._queue import QueueFull as QueueFull
from .server import CodedServer as CodedServer
from .server import Prediction as Prediction

__all__ = ["CodedServer", "Prediction", "QueueFull"]
