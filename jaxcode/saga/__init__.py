"""Trains by distributed SAGA, with a linear rate and little communication, and by SAGA as an optax transformation."""

from .baselines import FederatedAveraging as FederatedAveraging
from .baselines import MinibatchSgd as MinibatchSgd
from .baselines import Scaffold as Scaffold
from .distributed import DistributedSaga as DistributedSaga
from .distributed import soft_threshold as soft_threshold
from .linear import LinearLoss as LinearLoss
from .linear import logistic as logistic
from .linear import multinomial as multinomial
from .linear import squared as squared
from .method import AbstractMethod as AbstractMethod
from .ray_machines import NoMachines as NoMachines
from .ray_machines import RayMachines as RayMachines
from .run import DivergenceError as DivergenceError
from .run import History as History
from .sparse import SparseRows as SparseRows
from .state import State as State
from .transformation import ScaleBySagaState as ScaleBySagaState
from .transformation import saga as saga
from .transformation import scale_by_saga as scale_by_saga

__all__ = [
    "AbstractMethod",
    "DistributedSaga",
    "DivergenceError",
    "FederatedAveraging",
    "History",
    "LinearLoss",
    "MinibatchSgd",
    "NoMachines",
    "RayMachines",
    "Scaffold",
    "ScaleBySagaState",
    "SparseRows",
    "State",
    "logistic",
    "multinomial",
    "saga",
    "scale_by_saga",
    "soft_threshold",
    "squared",
]
