"""A differentiable coding layer for JAX: models answer although workers are slow, dead or missing.

K inputs are encoded by a closed-form smoothing spline into N coded inputs, N workers each run the model on theirs,
and the K results are decoded from the answers that came.
"""

from . import metrics as metrics
from . import nodes as nodes
from . import ordering as ordering
from . import outputs as outputs
from . import pools as pools
from . import robust as robust
from . import saga as saga
from . import splines as splines
from . import stop as stop
from . import stragglers as stragglers
from . import tuning as tuning
from . import workers as workers
from .coded import coded as coded
from .codes import AbstractCode as AbstractCode
from .codes import AbstractLinearCode as AbstractLinearCode
from .codes import BerrutCode as BerrutCode
from .codes import BSplineCode as BSplineCode
from .codes import FloaterHormannCode as FloaterHormannCode
from .codes import LagrangeCode as LagrangeCode
from .codes import ReplicationCode as ReplicationCode
from .codes import SplineCode as SplineCode
from .codes import UncodedCode as UncodedCode
from .serving import Answer as Answer
from .serving import CodedServer as CodedServer
from .tuning import tune as tune
