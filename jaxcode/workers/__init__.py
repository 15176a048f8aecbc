"""Where f runs in one compiled program over devices."""

from .in_graph import WorkerMap as WorkerMap
from .in_graph import pmap as pmap
from .in_graph import shard_map as shard_map
from .in_graph import vmap as vmap
