"""Where f runs: in one compiled program over devices, or in threads and Ray actors whose early answers are used."""

from .in_graph import WorkerMap as WorkerMap
from .in_graph import pmap as pmap
from .in_graph import shard_map as shard_map
from .in_graph import vmap as vmap
from .pool import AbstractPool as AbstractPool
from .ray_pool import RayPool as RayPool
from .responses import Fault as Fault
from .responses import NotEnoughAnswers as NotEnoughAnswers
from .responses import PoolClosed as PoolClosed
from .responses import Responses as Responses
from .thread_pool import ThreadPool as ThreadPool
