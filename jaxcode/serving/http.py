"""Serves a model over HTTP, coded over Ray workers: ``python -m jaxcode.serving --model module:attribute``.

    POST /          a batch, as JSON {"inputs": ...} or, with content type application/x-npy, as a NumPy file (.npy)
    GET  /healthz   200 while at least two workers are ready to answer, else 503
    GET  /metrics   counters in Prometheus' format

The response to JSON is JSON: "outputs", "error" (predicted, for each input; null where none can be), "exact" (whether
each output is the model's own), "returned" (how many answers were used) and "latency" in seconds. The response to a
NumPy file is a NumPy file of the outputs. Invalid requests get status 400, 404, 405, 413 or 415; those that are refused
as too few answers came in time, or rejected as the queue is full, 503. Errors are JSON: "error", a message.
"""

import argparse
import functools
import importlib
import io
import json
import logging
import math
import operator
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import ordering, outputs, stop
from ..checks import batch_size
from ..codes import ReplicationCode, SplineCode
from ..pools import NotEnoughAnswers, PoolClosed, RayPool
from ..pools.ray_actors import connect
from ..tuning import load_tuned
from ._queue import QueueFull
from .server import CodedServer

__all__ = ["Ingress", "main"]

log = logging.getLogger("jaxcode.serving.http")

_CODES = {
    "systematic": SplineCode.systematic,
    "repeated": SplineCode.repeated,
    "chebyshev": SplineCode.chebyshev,
    "replication": ReplicationCode,
}
_OUTPUTS = {"as-returned": outputs.as_returned, "logits": outputs.logits, "probabilities": outputs.probabilities}
_JSON, _NPY = "application/json", "application/x-npy"


def main(argv: Sequence[str] | None = None) -> None:
    """Serves a model, on a new cluster or a running one, until SIGTERM or SIGINT; then answers requests in flight.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid, or Ray Serve is not installed.
        ImportError: If Ray is not installed.
        RuntimeError: If the server cannot be started.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    try:
        _load_model(args.model, factory=False)
        code = _make_setup(args)["code"]
        _make_policy(args, code).check(code.num_workers, code.predicts_error)
        np.dtype(args.dtype)
    except (ImportError, AttributeError, ValueError, TypeError, OSError) as problem:
        parser.error(str(problem))
    cluster = connect(args.address)
    try:
        from ray import serve
    except ImportError as problem:
        cluster.close()
        parser.error(f"serving over HTTP needs Ray Serve: pip install 'jaxcode[serve]' ({problem})")
    stopped = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: stopped.set())
    try:
        _serve(serve, args)
        print(f"Serving {args.model} at http://{args.host}:{args.port}/ with {code.num_workers} workers.", flush=True)
        stopped.wait()
        print("Answering the requests in flight, then ending.", flush=True)
        # The replica answers its requests before it ends; the proxy must accept connections until then.
        serve.delete("jaxcode")
        serve.shutdown()
    finally:
        cluster.close()


def _serve(serve, args):
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options={"host": args.host, "port": args.port, "request_timeout_s": 2 * args.time_limit},
        proxy_location="HeadOnly",
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    deployment = serve.deployment(
        Ingress,
        num_replicas=1,
        max_ongoing_requests=4 * args.max_in_flight,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2 * args.time_limit + 5,
        health_check_timeout_s=60,
    )
    serve.run(deployment.bind(vars(args)), name="jaxcode", route_prefix="/")


class Ingress:
    """Answers HTTP requests by a `CodedServer`, whose pool it starts: the ingress deployment of Ray Serve.

    Args:
        settings: The parsed command line arguments of `main`, by name.
    """

    def __init__(self, settings: dict[str, Any]):
        args = argparse.Namespace(**settings)
        from prometheus_client import CollectorRegistry

        if args.address is None:
            _stay_on_loopback()
        self._limit, self._shape, self._dtype = int(args.max_body * 2**20), args.input_shape, args.dtype
        setup = _make_setup(args)
        code = setup["code"]
        self._pool = RayPool(
            _load_model(args.model, args.factory),
            code.num_workers,
            num_cpus=args.num_cpus,
            num_gpus=args.num_gpus,
            progress=False,
        )
        self._server = CodedServer(
            pool=self._pool,
            stop=_make_policy(args, code),
            time_limit=args.time_limit,
            max_in_flight=args.max_in_flight,
            **setup,
        )
        self._registry = CollectorRegistry()
        self._server.register_metrics(self._registry)
        if self._shape is not None:
            self._server.warm_up(jax.ShapeDtypeStruct((code.num_data, *self._shape), np.dtype(self._dtype)))

    async def __call__(self, request):
        """Answers one HTTP request.

        Args:
            request: A `starlette.requests.Request`.

        Returns:
            A `starlette.responses.Response`, an error response if the request cannot be answered.
        """
        from starlette.responses import JSONResponse, Response

        try:
            body, media_type = await self._respond(request)
            return Response(body, media_type=media_type)
        except _HTTPError as problem:
            return JSONResponse({"error": problem.message}, problem.status, headers=problem.headers)
        except (NotEnoughAnswers, PoolClosed, QueueFull) as problem:
            return JSONResponse({"error": str(problem)}, 503)
        except Exception:
            log.exception("a request could not be answered")
            return JSONResponse({"error": "internal error; see the log of the server"}, 500)

    async def _respond(self, request):
        path, method = request.url.path.rstrip("/"), request.method
        if path in ("/healthz", "/metrics"):
            _check_method(method, "GET", "HEAD")
            return self._health() if path == "/healthz" else self._metrics()
        if path != "":
            raise _HTTPError(404, f"there is nothing at {path}; expected /, /healthz or /metrics")
        _check_method(method, "POST")
        media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        readers = {_JSON: _from_json, _NPY: _from_npy}
        if media_type not in readers:
            raise _HTTPError(415, f"content type is {media_type or 'not given'}; expected {' or '.join(readers)}")
        body = await self._read_body(request)
        x = readers[media_type](body, self._dtype)
        self._check(x)
        prediction = await self._predict(x)
        return (_to_json if media_type == _JSON else _to_npy)(prediction)

    async def _read_body(self, request):
        """Reads the body of a request; raises as soon as it is too long."""
        too_long = _HTTPError(413, f"the body is longer than {self._limit} bytes; send smaller batches")
        if int(request.headers.get("content-length", 0)) > self._limit:
            raise too_long
        parts, length = [], 0
        async for part in request.stream():
            length += len(part)
            if length > self._limit:
                raise too_long
            parts.append(part)
        return b"".join(parts)

    def _check(self, x):
        leaves = jax.tree.leaves(x)
        try:
            batch_size("inputs", x)
        except ValueError as problem:
            raise _HTTPError(400, str(problem)) from problem
        if self._shape is not None and any(leaf.shape[1:] != self._shape for leaf in leaves):
            shapes = ", ".join(str(leaf.shape) for leaf in leaves)
            raise _HTTPError(400, f"inputs have shape {shapes}; expected a batch of inputs of shape {self._shape}")
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            raise _HTTPError(400, "inputs have NaN or infinite numbers")

    async def _predict(self, x):
        try:
            return await self._server.predict_async(x)
        except (TypeError, ValueError) as problem:  # raised by models for shapes they cannot take
            log.warning("invalid inputs: %s", problem)
            raise _HTTPError(400, f"the model cannot take these inputs: {str(problem).splitlines()[0]}") from problem

    def _health(self):
        states = self._pool.states()
        ready = sum(state in ("idle", "busy") for state in states)
        if ready < 2:
            raise _HTTPError(503, f"{ready} of {len(states)} workers are ready")
        return json.dumps({"status": "ready", "workers": {s: states.count(s) for s in sorted(set(states))}}), _JSON

    def _metrics(self):
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def __del__(self):
        pool = getattr(self, "_pool", None)
        if pool is not None:
            pool.close()


def _stay_on_loopback():
    """Makes the starting replica listen for Ray Serve's internal calls on the loopback interface only."""
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server  # pyright: ignore[reportPrivateImportUsage]

    def add_local_port(server, address):
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = add_local_port  # pyright: ignore[reportPrivateImportUsage]


class _HTTPError(Exception):
    """Carries an HTTP error response: its status, a message and headers."""

    def __init__(self, status, message, headers=None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


def _check_method(method, *allowed):
    if method not in allowed:
        raise _HTTPError(405, f"method is {method}; expected {allowed[0]}", {"Allow": ", ".join(allowed)})


def _from_json(body, dtype):
    try:
        x = json.loads(body)["inputs"]
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise _HTTPError(400, 'the body is not JSON of the form {"inputs": [...]}') from problem
    try:
        return jax.tree.map(functools.partial(np.asarray, dtype=dtype), x, is_leaf=lambda x: isinstance(x, list))
    except (ValueError, TypeError, OverflowError) as problem:
        raise _HTTPError(400, f"inputs are not numbers in equal rows: {problem}") from problem


def _from_npy(body, dtype):
    try:
        x = np.load(io.BytesIO(body), allow_pickle=False)
        return np.asarray(x, dtype)
    except (ValueError, TypeError, EOFError, AttributeError, OSError) as problem:
        raise _HTTPError(400, f"the body is not a NumPy file of numbers: {problem}") from problem


def _to_json(prediction):
    def to_list(leaf):
        leaf = _widen(leaf)
        # JSON has no infinity, which stands for an error that cannot be predicted.
        return np.where(np.isfinite(leaf), leaf.astype(object), np.asarray(None)).tolist()

    response = {
        "outputs": jax.tree.map(to_list, prediction.values),
        "error": None if prediction.error is None else to_list(prediction.error),
        "exact": prediction.exact.tolist(),
        "returned": int(prediction.returned.sum()),
        "latency": prediction.latency,
    }
    return json.dumps(response), _JSON


def _to_npy(prediction):
    if not isinstance(prediction.values, np.ndarray):
        raise _HTTPError(400, "the model returns several arrays; send the inputs as JSON")
    file = io.BytesIO()
    np.save(file, _widen(prediction.values), allow_pickle=False)
    return file.getvalue(), _NPY


def _widen(array):
    """Converts numbers that NumPy itself does not know, such as bfloat16, to float32."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _load_model(name: str, factory: bool):
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--model is {name!r}; expected module:attribute, such as my_package.models:predict")
    model = operator.attrgetter(attribute)(importlib.import_module(module))
    return model() if factory else model


def _make_setup(args) -> dict[str, Any]:
    """Makes the options of the server that say how batches are coded."""
    if args.tuned is not None:
        return load_tuned(args.tuned).setup()
    return {
        "code": _CODES[args.code](args.num_data, args.num_workers),
        "order": None if args.no_order else ordering.greedy,
        "output": _OUTPUTS[args.output],
    }


def _make_policy(args, code):
    num_answers = args.answers or math.ceil((code.num_data + code.num_workers) / 2)
    policy = stop.answers(num_answers)
    if args.deadline is not None:
        policy = policy | stop.deadline(args.deadline)
    if args.error_below is not None:
        policy = policy | stop.error_below(args.error_below)
    return policy


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxcode.serving",
        description="Serves a model over HTTP, coded over Ray workers: it answers although workers are late or dead.",
    )
    add = parser.add_argument

    def add_number(name: str, default: float | None, text: str, kind: type = int) -> None:
        suffix = "" if default is None else " (default: %(default)s)"
        add(name, type=_positive_reader(kind), default=default, metavar="n", help=text + suffix)

    add(
        "--model",
        required=True,
        metavar="module:attribute",
        help="a function of a batch, an nnx module or a pair (linen module, variables)",
    )
    add("--factory", action="store_true", help="the attribute is a function without arguments that returns the model")
    add(
        "--tuned",
        type=lambda folder: str(Path(folder).resolve()),
        metavar="folder",
        help="where jaxcode.Tuned.save wrote what was chosen: code, order, output space, prior; instead of the options "
        "for these",
    )
    add(
        "--code",
        choices=sorted(_CODES),
        default="systematic",
        help="code and layout of its nodes (default: %(default)s)",
    )
    add_number("--num-data", 20, "K, inputs coded together")
    add_number("--num-workers", 30, "N, worker processes")
    add("--output", choices=sorted(_OUTPUTS), default="as-returned", help="space to decode in (default: %(default)s)")
    add("--no-order", action="store_true", help="group inputs in the order of the batch, not similar ones together")
    add_number("--answers", None, "answers to wait for (default: halfway between K and N)")
    add_number(
        "--deadline",
        None,
        "seconds after which to decode from the answers that came, if they are enough",
        float,
    )
    add_number("--error-below", None, "predicted error to reach, for all inputs of a batch", float)
    add_number("--time-limit", 30.0, "seconds after which a request is refused", float)
    add(
        "--input-shape",
        type=_shape,
        metavar="n,n,...",
        help="shape of one input: others are errors, and workers compile for it at the start",
    )
    add("--dtype", default="float32", help="dtype of inputs (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: %(default)s)")
    add_number("--port", 8000, "port to listen at")
    add_number("--max-body", 64.0, "maximal length of a request's body, in MiB", float)
    add_number("--max-in-flight", 8, "requests that are worked on concurrently; others wait")
    add("--address", help="address of a running Ray cluster; a local one is started if not given")
    add("--num-cpus", type=float, default=0, help="processors that Ray reserves for a worker (default: %(default)s)")
    add("--num-gpus", type=float, default=0, help="GPUs that Ray reserves for a worker (default: %(default)s)")
    return parser


def _positive_reader(kind):
    """Returns a function that reads a number above zero from an argument."""

    def read(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above zero, got {text}")
        return value

    read.__name__ = kind.__name__
    return read


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive_reader(int)(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 28,28,1, got {text!r}") from None
