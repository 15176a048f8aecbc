"""A differentiable coding layer for JAX: models answer although workers are slow, dead or faulty.

K inputs are encoded, by a closed-form smoothing spline for instance, into N coded inputs; each of N workers runs the
model on one of them, and the K results are decoded from the answers that came.

Every public name is reachable from here; what only a module with a leading underscore holds is private, except for
`coded`, `Coded`, `pytree` and `SideInput`, which are imported below. By purpose:

* `codes`, `nodes`, `ordering`, `allocation`: which coded inputs there are.
* `placement`, `pools`: where workers run; `stragglers` models their latencies.
* `serving`, `stop`: when answers are enough.
* `interpolants`, `linops`, `outputs`, `robust`: how answers become results; `surrogates`: guesses before they come.
* `tuning`: which code suits a model; `metrics` measures it.
* `training`: codes and priors, trained through the decoder; `saga`: linear models, by several machines.
* `checks`: argument checks, for codes and interpolants of one's own.
"""

from . import allocation as allocation
from . import checks as checks
from . import interpolants as interpolants
from . import linops as linops
from . import metrics as metrics
from . import nodes as nodes
from . import ordering as ordering
from . import outputs as outputs
from . import placement as placement
from . import pools as pools
from . import robust as robust
from . import saga as saga
from . import serving as serving
from . import stop as stop
from . import stragglers as stragglers
from . import surrogates as surrogates
from . import training as training
from . import tuning as tuning
from ._coded import Coded as Coded
from ._coded import coded as coded
from ._pytree import pytree as pytree
from ._side_input import SideInput as SideInput
from .codes import AbstractCode as AbstractCode
from .codes import BerrutCode as BerrutCode
from .codes import BSplineCode as BSplineCode
from .codes import FloaterHormannCode as FloaterHormannCode
from .codes import InterpolatingCode as InterpolatingCode
from .codes import KernelCode as KernelCode
from .codes import LagrangeCode as LagrangeCode
from .codes import Plan as Plan
from .codes import Prior as Prior
from .codes import ReplicationCode as ReplicationCode
from .codes import SplineCode as SplineCode
from .codes import UncodedCode as UncodedCode
from .serving import CodedServer as CodedServer
from .serving import Prediction as Prediction
from .surrogates import Surrogate as Surrogate
from .surrogates import load_surrogate as load_surrogate
from .surrogates import surrogate as surrogate
from .tuning import load_tuned as load_tuned
from .tuning import tune as tune
