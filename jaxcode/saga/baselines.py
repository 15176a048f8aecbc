"""What distributed SAGA is compared with: methods whose machines remember no samples' gradients."""

from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .._pytree import pytree
from .gradients import gradients_of
from .method import AbstractMethod, Loss, check_method

_STATIC = "loss", "num_machines", "period", "batch_size", "shard_sizes", "mesh"


@final
@pytree(*_STATIC, eq=False)
class MinibatchSgd(AbstractMethod):
    r"""Every machine computes the gradient of a minibatch; one step against their mean.

    .. math:: w \leftarrow w - \frac{\gamma}{1 + \delta r} \sum_k \frac{m_k}{n} g_k(w)

    A machine sends d numbers a round.

    Attributes:
        decay: :math:`\delta`, of round r.
        loss: As for `AbstractMethod`, as are all others; a round's minibatch has period times batch_size samples.
    """

    loss: Loss
    num_machines: int
    period: int = 1
    ridge: Any = 0.0
    step_size: Any = None
    decay: Any = 0.0
    batch_size: int = 1
    shard_sizes: Sequence[int] | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        check_method(self)

    def _begin(self, common, machine):
        return _nothing(common)

    def _work(self, common, machine, key):
        index = jax.random.randint(key, (self.period * self.batch_size,), 0, machine.size)
        step = _step_size(self, common)
        return -step * _gradient(self, common, machine, index)(common.w), (), machine.told


@final
@pytree(*_STATIC, eq=False)
class FederatedAveraging(AbstractMethod):
    r"""Local SGD: every machine goes its own way for a round; then the mean of where they are.

    .. math:: w_k \leftarrow w_k - \frac{\gamma}{1 + \delta r} g_j(w_k), \qquad w = \sum_k \frac{m_k}{n} w_k

    Where machines differ, it ends where they contradict each other, not at the optimum, unless steps decay. A machine
    sends d numbers a round.

    Attributes:
        decay: :math:`\delta`, of round r.
        loss: As for `AbstractMethod`, as are all others.

    References:
        McMahan and others, Communication-Efficient Learning of Deep Networks from Decentralized Data, arXiv 1602.05629.
    """

    loss: Loss
    num_machines: int
    period: int
    ridge: Any = 0.0
    step_size: Any = None
    decay: Any = 0.0
    batch_size: int = 1
    shard_sizes: Sequence[int] | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        check_method(self)

    def _begin(self, common, machine):
        return _nothing(common)

    def _work(self, common, machine, key):
        step = _step_size(self, common)
        w = _walk(self, common, machine, key, step, 0.0)
        return w - common.w, (), machine.told


@final
@pytree(*_STATIC, eq=False)
class Scaffold(AbstractMethod):
    r"""SCAFFOLD: local SGD whose steps are corrected by how a machine's gradients differ from all machines'.

    .. math::
        w_k \leftarrow w_k - \gamma (g_j(w_k) - c_k + c), \qquad
        c_k \leftarrow c_k - c + \frac{w - w_k}{\tau \gamma}, \qquad c = \sum_k \frac{m_k}{n} c_k

    Drift between machines goes away; the noise of samples does not. A machine sends 2 d numbers a round.

    Attributes:
        decay: :math:`\delta`: steps of round r are :math:`\gamma / (1 + \delta r)`.
        loss: As for `AbstractMethod`, as are all others.

    References:
        Karimireddy and others, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, arXiv 1910.06378,
        option II.
    """

    loss: Loss
    num_machines: int
    period: int
    ridge: Any = 0.0
    step_size: Any = None
    decay: Any = 0.0
    batch_size: int = 1
    shard_sizes: Sequence[int] | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        check_method(self)

    def _begin(self, common, machine):
        zeros = jnp.zeros_like(common.w)
        return zeros, zeros

    def _work(self, common, machine, key):
        step = _step_size(self, common)
        w = _walk(self, common, machine, key, step, common.shared - machine.own)
        there = machine.share > 0
        control = machine.own - common.shared + (common.w - w) / (self.period * step)
        control = jnp.where(there, control, machine.own)
        weight = machine.size / common.num_samples
        return w - common.w, control, control * weight.astype(control.dtype)


def _nothing(common):
    """What a machine keeps, and tells, that remembers nothing."""
    return (), jnp.zeros(0, common.w.dtype)


def _step_size(method, common):
    """Of this round."""
    return common.step_size / (1 + method.decay * common.round)


def _gradient(method, common, machine, chosen):
    """Of the mean loss of chosen samples, ridge included."""
    gradients = gradients_of(method.loss, common.w, common.unravel)
    samples = jax.tree.map(lambda leaf: leaf[chosen], machine.samples)
    return lambda w: gradients.total(gradients.entries(w, samples), samples) / chosen.size + method.ridge * w


def _walk(method, common, machine, key, step, correction):
    """A round of corrected stochastic gradient steps."""
    index = jax.random.randint(key, (method.period, method.batch_size), 0, machine.size)

    def go(t, w):
        return w - step * (_gradient(method, common, machine, index[t])(w) + correction)

    return jax.lax.fori_loop(0, method.period, go, common.w)
