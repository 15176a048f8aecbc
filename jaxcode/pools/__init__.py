"""Runs workers whose early answers are used: threads of this process, and Ray actors."""

from .pool import AbstractPool as AbstractPool
from .pool import WorkerPool as WorkerPool
from .ray_pool import RayPool as RayPool
from .responses import Fault as Fault
from .responses import NotEnoughAnswers as NotEnoughAnswers
from .responses import PoolClosed as PoolClosed
from .responses import Responses as Responses
from .supervisor import WorkerDied as WorkerDied
from .threads import ThreadPool as ThreadPool
from .worker import AbstractWorker as AbstractWorker

__all__ = [
    "AbstractPool",
    "AbstractWorker",
    "Fault",
    "NotEnoughAnswers",
    "PoolClosed",
    "RayPool",
    "Responses",
    "ThreadPool",
    "WorkerDied",
    "WorkerPool",
]
