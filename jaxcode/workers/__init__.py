"""Where f runs: threads of this process or Ray actors, on their own devices, early answers used."""

from .dispatch import AbstractWorker as AbstractWorker
from .dispatch import WorkerDied as WorkerDied
from .pool import AbstractPool as AbstractPool
from .ray_pool import RayPool as RayPool
from .responses import Fault as Fault
from .responses import NotEnoughAnswers as NotEnoughAnswers
from .responses import PoolClosed as PoolClosed
from .responses import Responses as Responses
from .thread_pool import ThreadPool as ThreadPool
