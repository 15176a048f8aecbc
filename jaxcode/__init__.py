"""A differentiable coding layer for JAX: models answer although workers are slow, dead or faulty.

K inputs are encoded by a closed-form smoothing spline into N coded inputs, N workers each run the model on theirs, and
the K results are decoded from the answers that came.

Everything that is meant to be used is reachable from here; a module whose name begins with an underscore holds one
function or class that is (`jaxcode.coded`), or helpers. A package holds what answers one question: `codes` and `nodes`
which pieces of work there are, `placement` and `pools` where they run, `serving` and `stop` when answers are enough,
`interpolants`, `linops` and `robust` how answers become results, `tuning` what is best for a model, `saga` training.
"""

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
from . import tuning as tuning
from ._coded import Coded as Coded
from ._coded import coded as coded
from ._pytree import pytree as pytree
from .codes import AbstractCode as AbstractCode
from .codes import BerrutCode as BerrutCode
from .codes import BSplineCode as BSplineCode
from .codes import FloaterHormannCode as FloaterHormannCode
from .codes import InterpolatingCode as InterpolatingCode
from .codes import LagrangeCode as LagrangeCode
from .codes import Plan as Plan
from .codes import Prior as Prior
from .codes import ReplicationCode as ReplicationCode
from .codes import SplineCode as SplineCode
from .codes import UncodedCode as UncodedCode
from .serving import CodedServer as CodedServer
from .serving import Prediction as Prediction
from .tuning import tune as tune
