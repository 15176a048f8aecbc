"""Compares codes on inputs that lie in order by nature, as values of a parameter do: `python -m models.sweeps`."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jaxcode as jc
from jaxcode.functions import Model, as_pure_function

from . import datasets
from .networks import DEFAULT_NETWORKS, load_stored

_SETTINGS = ((30, 20, 5), (12, 8, 2), (24, 20, 3))
_FOOTNOTE = """\
Root mean square error over {requests} requests and {sets} straggler sets of each, relative to the standard deviation of
each output, and its 95 % interval by bootstrap over requests; the same requests and sets for every column. Every column
is the best of its candidates on {requests} other requests, by `jaxcode.tune`: splines are all layouts and smoothings of
spline codes and the paper's; replication has lost inputs filled by a Gaussian process fitted as that of the kernel code
is. Ratio: of kernel code to the better of the two, with its interval."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Holds a function and how requests for it are drawn.

    Attributes:
        f: From a batch of inputs to its results.
        draw: From a generator and K to the inputs of one request, in order.
    """

    f: Model
    draw: Callable[[np.random.Generator, int], Float[np.ndarray, "data *shape"]]


def van_der_pol(x: Float[Array, "batch 1"]) -> Float[Array, "batch 2"]:
    """Computes the state of van der Pol's oscillator after 10 units of time, for each stiffness."""

    def derivative(state, stiffness):
        place, speed = state
        return jnp.stack([speed, stiffness * (1 - place**2) * speed - place])

    return jax.vmap(lambda stiffness: integrate(derivative, jnp.array([2.0, 0.0]), stiffness[0], 10.0))(x)


def pendulum(x: Float[Array, "batch 2"]) -> Float[Array, "batch 2"]:
    """Computes the state of a driven pendulum after 5 units of time, for each damping and strength of the drive."""

    def derivative(state, parameters):
        angle, speed, time = state
        damping, strength = parameters
        return jnp.stack(
            [speed, strength * jnp.cos(0.7 * time) - damping * speed - jnp.sin(angle), jnp.ones_like(time)]
        )

    return jax.vmap(lambda pair: integrate(derivative, jnp.array([0.5, 0.0, 0.0]), pair, 5.0)[:2])(x)


def moving_images(name: str, data_dir: str | None, out: Path) -> Sweep:
    """Makes the sweep of an image that moves through a trained network's field of view, by .2 pixels a frame."""
    data = datasets.load(name, data_dir)
    network = DEFAULT_NETWORKS[name]
    model = load_stored(network, data, name, out)

    def shift(image, offset):
        rows, columns = (jnp.arange(size, dtype=jnp.float32) for size in image.shape[:2])
        grid = jnp.meshgrid(rows - offset[0], columns - offset[1], indexing="ij")
        return jnp.stack(
            [jax.scipy.ndimage.map_coordinates(image[..., c], grid, order=1) for c in range(image.shape[2])], axis=-1
        )

    move = jax.jit(jax.vmap(shift, (None, 0)))

    def draw(rng, num_data):
        angle = rng.uniform(0, 2 * np.pi)
        steps = 0.2 * (np.arange(num_data) - num_data / 2)
        offsets = np.stack([steps * np.cos(angle), steps * np.sin(angle)], axis=1).astype(np.float32)
        return np.asarray(move(data.x_test[rng.integers(len(data.x_test))], offsets))

    return Sweep(model, draw)


def integrate(
    derivative: Callable[[Array, Any], Array],
    state: Float[Array, "numbers"],
    parameters: Any,
    duration: float,
    num_steps: int = 400,
) -> Float[Array, "numbers"]:
    """Integrates an ordinary differential equation by Runge and Kutta's method of order 4.

    Args:
        derivative: From a state and parameters to the state's derivative by time.
        state: The state at the start.
        parameters: Of the derivative.
        duration: For how long.
        num_steps: Steps of equal length.

    Returns:
        The state at the end.
    """
    step = duration / num_steps

    def advance(_, state):
        k1 = derivative(state, parameters)
        k2 = derivative(state + step / 2 * k1, parameters)
        k3 = derivative(state + step / 2 * k2, parameters)
        k4 = derivative(state + step * k3, parameters)
        return state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return jax.lax.fori_loop(0, num_steps, advance, state)


def draw_interval(rng: np.random.Generator, num_data: int) -> Float[np.ndarray, "data 1"]:
    """Draws equidistant values of a stiffness."""
    start, width = rng.uniform(0.2, 1.5), rng.uniform(0.5, 1.5)
    return np.linspace(start, start + width, num_data, dtype=np.float32)[:, None]


def draw_rectangle(rng: np.random.Generator, num_data: int) -> Float[np.ndarray, "data 2"]:
    """Draws a grid of two parameters, row by row, every second row backwards."""
    num_columns = max(n for n in range(1, int(num_data**0.5) + 1) if num_data % n == 0)
    rows, columns = np.meshgrid(
        np.linspace(0, 1, num_data // num_columns), np.linspace(0, 1, num_columns), indexing="ij"
    )
    columns[1::2] = columns[1::2, ::-1]
    grid = np.stack([rows.ravel(), columns.ravel()], axis=1)
    start, width = rng.uniform((0.05, 0.1), (0.5, 0.5)), rng.uniform(0.2, 0.5, size=2)
    return (start + width * grid).astype(np.float32)


def compare(
    sweep: Sweep, setting: tuple[int, int, int], *, num_requests: int, num_sets: int, seed: int
) -> dict[str, Float[np.ndarray, "requests"]]:
    """Measures the mean square error of every kind of code on requests that none was tuned on.

    Args:
        sweep: The function and its requests.
        setting: N, K, S.
        num_requests: Requests to tune on, and as many to measure on.
        num_sets: Straggler sets of each request.
        seed: Of the requests and sets.

    Returns:
        By kind, "splines", "replication", "kernel" and "tuned", the mean square error of each request, in units of the
        outputs' variances.
    """
    num_workers, num_data, num_late = setting
    rng = np.random.default_rng((seed, *setting))
    tuning_sample = np.concatenate([sweep.draw(rng, num_data) for _ in range(num_requests)])
    requests = np.stack([sweep.draw(rng, num_data) for _ in range(num_requests)])
    stragglers = jc.stragglers.Uniform(num_late)
    fn, params = as_pure_function(sweep.f)
    targets = np.stack([jax.jit(fn)(params, request) for request in requests])
    variance = targets.reshape(-1, targets.shape[-1]).var(axis=0)
    masks = jax.vmap(lambda key: stragglers.sample(key, num_workers))(jax.random.split(jax.random.key(seed), num_sets))
    layouts = {
        **jc.tuning.standard_layouts(num_data, num_workers),
        **jc.tuning.kernel_layouts(num_data, num_workers, late=num_late / num_workers),
        "kernel, copies": jc.KernelCode(num_data, num_workers, mixes=False),
    }
    errors = {}
    for kind, chosen in _kinds(layouts).items():
        tuned = jc.tune(sweep.f, tuning_sample, num_data, num_workers, stragglers, layouts=chosen, progress=False)
        decode = jax.jit(jax.vmap(tuned.coded(sweep.f), (None, 0)))
        errors[kind] = np.array(
            [
                np.mean(np.square(decode(request, masks) - target) / variance)
                for request, target in zip(requests, targets, strict=True)
            ]
        )
    return errors


def main(argv: Sequence[str] | None = None) -> None:
    """Compares codes on three sweeps at three sizes and prints a table of each.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = argparse.ArgumentParser(prog="python -m models.sweeps", description=__doc__)
    parser.add_argument("--dataset", choices=datasets.NAMES, default="digits", help="images that move")
    parser.add_argument("--requests", type=int, default=32, help="requests, to tune on and to measure on")
    parser.add_argument("--sets", type=int, default=100, help="straggler sets of each request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", help="folder of the data sets; JAXCODE_DATA if not given")
    parser.add_argument("--out", type=Path, default=Path("out/sweeps"), help="folder of trained weights")
    args = parser.parse_args(argv)
    if min(args.requests, args.sets) < 2:
        parser.error("--requests and --sets must be at least 2")
    sweeps = {
        "van der Pol's oscillator, one parameter": Sweep(van_der_pol, draw_interval),
        "a driven pendulum, two parameters": Sweep(pendulum, draw_rectangle),
        f"an image of {args.dataset} moving through a network": moving_images(args.dataset, args.data_dir, args.out),
    }
    heads = ("splines", "replication, GP", "kernel code", "ratio", "tuned")
    for name, sweep in sweeps.items():
        print(f"{name}\n{'N,K,S':>8}" + "".join(f"{head:>28}" for head in heads))
        for setting in _SETTINGS:
            errors = compare(sweep, setting, num_requests=args.requests, num_sets=args.sets, seed=args.seed)
            best = min(("splines", "replication"), key=lambda kind: errors[kind].mean())
            cells = [_root(errors[kind]) for kind in ("splines", "replication", "kernel")]
            cells += [_root(errors["kernel"], errors[best]), _root(errors["tuned"])]
            print(f"{','.join(map(str, setting)):>8}" + "".join(f"{cell:>28}" for cell in cells), flush=True)
        print()
    print(_FOOTNOTE.format(**vars(args)))


def _kinds(layouts: Mapping[str, jc.AbstractCode]) -> dict[str, dict[str, jc.AbstractCode]]:
    """Returns the candidates of each column."""
    kernels = {name: code for name, code in layouts.items() if isinstance(code, jc.KernelCode)}
    return {
        "splines": {
            name: code
            for name, code in layouts.items()
            if isinstance(getattr(code, "decoder", None), jc.interpolants.Spline)
        },
        "replication": {name: code for name, code in kernels.items() if not code.mixes},
        "kernel": {name: code for name, code in kernels.items() if code.mixes},
        "tuned": dict(layouts),
    }


def _root(squares: Float[np.ndarray, "requests"], divisors: Float[np.ndarray, "requests"] | None = None) -> str:
    """Formats the root of a mean, or of a ratio of means, and its interval by bootstrap."""
    rows = np.random.default_rng(0).integers(len(squares), size=(2000, len(squares)))
    divisors = np.ones_like(squares) if divisors is None else divisors
    low, high = np.quantile(np.sqrt(squares[rows].mean(axis=1) / divisors[rows].mean(axis=1)), (0.025, 0.975))
    return f"{np.sqrt(squares.mean() / divisors.mean()):.2g} ({low:.2g}, {high:.2g})"


if __name__ == "__main__":
    main()
