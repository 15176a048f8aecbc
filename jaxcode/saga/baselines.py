"""Defines methods to compare distributed SAGA with, whose machines store no gradients of samples."""

from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .._pytree import pytree
from .gradients import gradients_of
from .method import AbstractMethod, Loss, check_method
from .step_size import lipschitz_step_size

_STATIC = "loss", "num_machines", "period", "batch_size", "shard_sizes", "mesh"


@final
@pytree(*_STATIC, eq=False)
class MinibatchSgd(AbstractMethod):
    r"""Computes one step a round against the mean gradient of all machines' minibatches.

    .. math:: w \leftarrow w - \frac{\gamma}{1 + \delta r} \sum_k \frac{m_k}{n} g_k(w)

    Machine k has :math:`m_k` of the n samples, :math:`g_k` is the mean gradient of its minibatch, and r the number of
    rounds so far. A machine sends d numbers a round.

    Attributes:
        decay: :math:`\delta`; the step of round r is :math:`\gamma / (1 + \delta r)`.
        loss: As for `AbstractMethod`, like all other attributes and errors. A round's minibatch has period times
            batch_size samples.
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

    def begin(self, common, machine):
        return _empty_state(common)

    def work(self, common, machine, key):
        index = jax.random.randint(key, (self.period * self.batch_size,), 0, machine.size)
        step = _step_size(self, common)
        return -step * _batch_gradient(self, common, machine, index)(common.w), (), machine.message

    def default_step_size(self, params, shards):
        return lipschitz_step_size(self.loss, self.ridge, params, shards)


@final
@pytree(*_STATIC, eq=False)
class FederatedAveraging(AbstractMethod):
    r"""Averages the parameters of machines after a round of local SGD on each.

    .. math:: w_k \leftarrow w_k - \frac{\gamma}{1 + \delta r} g_j(w_k), \qquad w = \sum_k \frac{m_k}{n} w_k

    Machine k has :math:`m_k` of the n samples, :math:`g_j` is the mean gradient of minibatch j, and r is the number of
    rounds so far. Where machines' samples differ, it does not converge to the optimum unless steps decay. A
    machine sends d numbers a round.

    Attributes:
        decay: :math:`\delta`; steps of round r are :math:`\gamma / (1 + \delta r)`.
        loss: As for `AbstractMethod`, like all other attributes and errors.

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

    def begin(self, common, machine):
        return _empty_state(common)

    def work(self, common, machine, key):
        step = _step_size(self, common)
        w = _local_sgd(self, common, machine, key, step, 0.0)
        return w - common.w, (), machine.message

    def default_step_size(self, params, shards):
        return lipschitz_step_size(self.loss, self.ridge, params, shards)


@final
@pytree(*_STATIC, eq=False)
class Scaffold(AbstractMethod):
    r"""Corrects the steps of local SGD by the difference of a machine's gradients from all machines' (SCAFFOLD).

    .. math::
        w_k \leftarrow w_k - \gamma (g_j(w_k) - c_k + c), \qquad
        c_k \leftarrow c_k - c + \frac{w - w_k}{\tau \gamma}, \qquad c = \sum_k \frac{m_k}{n} c_k

    Machine k has :math:`m_k` of the n samples, :math:`g_j` is the mean gradient of minibatch j, :math:`c_k` the control
    variate of machine k, and :math:`\tau` the period. The drift of machines vanishes; the noise of samples does not. A
    machine sends 2 d numbers a round.

    Attributes:
        decay: :math:`\delta`: steps of round r are :math:`\gamma / (1 + \delta r)`.
        loss: As for `AbstractMethod`, like all other attributes and errors.

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

    def begin(self, common, machine):
        zeros = jnp.zeros_like(common.w)
        return zeros, zeros

    def work(self, common, machine, key):
        step = _step_size(self, common)
        w = _local_sgd(self, common, machine, key, step, common.message_sum - machine.local)
        control = machine.local - common.message_sum + (common.w - w) / (self.period * step)
        control = jnp.where(machine.active, control, machine.local)
        weight = machine.size.astype(control.dtype) / common.num_samples
        return w - common.w, control, control * weight

    def default_step_size(self, params, shards):
        return lipschitz_step_size(self.loss, self.ridge, params, shards)


def _empty_state(common):
    """Returns the local state and message of a machine that remembers nothing."""
    return (), jnp.zeros(0, common.w.dtype)


def _step_size(method, common):
    """Returns the step size of this round."""
    return common.step_size / (1 + method.decay * common.round.astype(common.w.dtype))


def _batch_gradient(method, common, machine, index):
    """Returns the gradient, a function of parameters, of the mean loss of some samples, ridge included."""
    gradients = gradients_of(method.loss, common.w, common.unravel)
    samples = jax.tree.map(lambda leaf: leaf[index], machine.samples)
    return lambda w: gradients.total(gradients.entries(w, samples), samples) / index.size + method.ridge * w


def _local_sgd(method, common, machine, key, step_size, correction):
    """Returns a machine's parameters after a round of corrected stochastic gradient steps."""
    index = jax.random.randint(key, (method.period, method.batch_size), 0, machine.size)

    def step(t, w):
        return w - step_size * (_batch_gradient(method, common, machine, index[t])(w) + correction)

    return jax.lax.fori_loop(0, method.period, step, common.w)
