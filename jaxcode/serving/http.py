"""A model behind HTTP, coded over Ray workers: ``python -m jaxcode.serve --model module:attribute``.

    POST /          a batch, as JSON {"inputs": ...} or, with content type application/x-npy, as a NumPy file (.npy)
    GET  /healthz   200 while workers are ready to answer, else 503
    GET  /metrics   counters in Prometheus' format

Answers to JSON are JSON: "outputs", "error" (predicted, of each input; null where nothing can be said), "returned" (how
many workers' answers were used) and "latency" in seconds. Answers to a NumPy file are one. What is wrong with a request
is said with status 400, 404, 405, 413 or 415; that too few workers answered in time, with 503.
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
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from . import ordering, outputs, stop
from .checks import batch_size
from .codes import ReplicationCode, SplineCode
from .serving import CodedServer
from .workers import NotEnoughAnswers, PoolClosed, RayPool
from .workers.ray_pool import connect

log = logging.getLogger("jaxcode.serve")

_CODES = {
    "systematic": SplineCode.systematic,
    "repeated": SplineCode.repeated,
    "chebyshev": SplineCode.chebyshev,
    "replication": ReplicationCode,
}
_OUTPUTS = {"as-returned": outputs.as_returned, "logits": outputs.logits, "probabilities": outputs.probabilities}
_JSON, _NPY = "application/json", "application/x-npy"


def main(argv: Sequence[str] | None = None) -> None:
    """Starts a cluster or joins one, serves until SIGTERM or SIGINT, then answers what is under way and ends."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _model(args.model, factory=False)
        _policy(args).check(args.num_workers, args.code != "replication")
        _code(args)
        np.dtype(args.dtype)
    except (ImportError, AttributeError, ValueError, TypeError) as problem:
        parser.error(str(problem))
    end = connect(args.address)[1]
    try:
        from ray import serve
    except ImportError as problem:
        end()
        parser.error(f"serving over HTTP needs Ray Serve: pip install 'jaxcode[serve]' ({problem})")
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    try:
        _serve(serve, args)
        print(f"Serving {args.model} at http://{args.host}:{args.port}/ with {args.num_workers} workers.", flush=True)
        over.wait()
        print("Answering what is under way, then ending.", flush=True)
        # Replicas answer what they have before they end; only then does the front go.
        serve.delete("jaxcode")
        serve.shutdown()
    finally:
        end()


def _serve(serve, args):
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options={"host": args.host, "port": args.port, "request_timeout_s": 2 * args.time_limit},
        proxy_location="HeadOnly",
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    deployment = serve.deployment(
        Front,
        num_replicas=1,
        max_ongoing_requests=4 * args.max_in_flight,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2 * args.time_limit + 5,
        health_check_timeout_s=60,
    )
    serve.run(deployment.bind(vars(args)), name="jaxcode", route_prefix="/")


class Front:
    """One replica: turns HTTP requests into requests to a `CodedServer`, whose workers it starts."""

    def __init__(self, settings: dict[str, Any]):
        args = argparse.Namespace(**settings)
        from prometheus_client import CollectorRegistry

        if args.address is None:
            _stay_on_loopback()
        self._limit, self._shape, self._dtype = int(args.max_body * 2**20), args.input_shape, args.dtype
        self._pool = RayPool(
            _model(args.model, args.factory),
            args.num_workers,
            num_cpus=args.num_cpus,
            num_gpus=args.num_gpus,
            progress=False,
        )
        self._server = CodedServer(
            _code(args),
            self._pool,
            _policy(args),
            time_limit=args.time_limit,
            order=None if args.no_order else ordering.greedy,
            output=_OUTPUTS[args.output],
            max_in_flight=args.max_in_flight,
        )
        self._registry = CollectorRegistry()
        self._server.register_metrics(self._registry)
        if self._shape is not None:
            self._server.warm_up(jax.ShapeDtypeStruct((args.num_data, *self._shape), np.dtype(self._dtype)))

    async def __call__(self, request):
        """Answers one HTTP request, a `starlette.requests.Request`."""
        from starlette.responses import JSONResponse, Response

        try:
            body, kind = await self._answer(request)
            return Response(body, media_type=kind)
        except _Refusal as refusal:
            return JSONResponse({"error": refusal.message}, refusal.status, headers=refusal.headers)
        except (NotEnoughAnswers, PoolClosed) as problem:
            return JSONResponse({"error": str(problem)}, 503)
        except Exception:
            log.exception("a request could not be answered")
            return JSONResponse({"error": "an error of the server's own; see its log"}, 500)

    async def _answer(self, request):
        path, method = request.url.path.rstrip("/"), request.method
        if path in ("/healthz", "/metrics"):
            _allow(method, "GET", "HEAD")
            return self._health() if path == "/healthz" else self._metrics()
        if path != "":
            raise _Refusal(404, f"there is nothing at {path}; expected /, /healthz or /metrics")
        _allow(method, "POST")
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        readers = {_JSON: _from_json, _NPY: _from_npy}
        if kind not in readers:
            raise _Refusal(415, f"content type is {kind or 'not given'}; expected {' or '.join(readers)}")
        body = await self._body(request)
        x = readers[kind](body, self._dtype)
        self._check(x)
        answer = await self._predict(x)
        return (_to_json if kind == _JSON else _to_npy)(answer)

    async def _body(self, request):
        """The request's body, refused as soon as it is too long."""
        too_long = _Refusal(413, f"the body is longer than {self._limit} bytes; send smaller batches")
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
            raise _Refusal(400, str(problem)) from problem
        if self._shape is not None and any(leaf.shape[1:] != self._shape for leaf in leaves):
            shapes = ", ".join(str(leaf.shape) for leaf in leaves)
            raise _Refusal(400, f"inputs have shape {shapes}; expected a batch of inputs of shape {self._shape}")
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            raise _Refusal(400, "inputs have NaN or infinite numbers")

    async def _predict(self, x):
        try:
            return await self._server.asynchronously(x)
        except (TypeError, ValueError) as problem:  # what a model says of shapes that it cannot take
            log.warning("refused: %s", problem)
            raise _Refusal(400, f"the model cannot take these inputs: {str(problem).splitlines()[0]}") from problem

    def _health(self):
        states = self._pool.states()
        ready = sum(state in ("idle", "busy") for state in states)
        if ready < 2:
            raise _Refusal(503, f"{ready} of {len(states)} workers are ready")
        return json.dumps({"status": "ready", "workers": {s: states.count(s) for s in sorted(set(states))}}), _JSON

    def _metrics(self):
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def __del__(self):
        pool = getattr(self, "_pool", None)
        if pool is not None:
            pool.close()


def _stay_on_loopback():
    """Has the replica, which is starting, take calls of Ray Serve's own from this machine only, not from everywhere."""
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server  # pyright: ignore[reportPrivateImportUsage]

    def add_local_port(server, address):
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = add_local_port  # pyright: ignore[reportPrivateImportUsage]


class _Refusal(Exception):
    """What is wrong with a request."""

    def __init__(self, status, message, headers=None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


def _allow(method, *methods):
    if method not in methods:
        raise _Refusal(405, f"method is {method}; expected {methods[0]}", {"Allow": ", ".join(methods)})


def _from_json(body, dtype):
    try:
        x = json.loads(body)["inputs"]
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise _Refusal(400, 'the body is not JSON of the form {"inputs": [...]}') from problem
    try:
        return jax.tree.map(functools.partial(np.asarray, dtype=dtype), x, is_leaf=lambda x: isinstance(x, list))
    except (ValueError, TypeError) as problem:
        raise _Refusal(400, f"inputs are not numbers in equal rows: {problem}") from problem


def _from_npy(body, dtype):
    try:
        x = np.load(io.BytesIO(body), allow_pickle=False)
        return np.asarray(x, dtype)
    except (ValueError, TypeError, EOFError, AttributeError, OSError) as problem:
        raise _Refusal(400, f"the body is not a NumPy file of numbers: {problem}") from problem


def _to_json(answer):
    def plain(leaf):
        # JSON has no infinity, which an error of nothing known is.
        return np.where(np.isfinite(leaf), leaf.astype(object), np.asarray(None)).tolist()

    said = {
        "outputs": jax.tree.map(plain, answer.values),
        "error": None if answer.error is None else plain(answer.error),
        "returned": int(answer.returned.sum()),
        "latency": answer.latency,
    }
    return json.dumps(said), _JSON


def _to_npy(answer):
    if not isinstance(answer.values, np.ndarray):
        raise _Refusal(400, "the model returns several arrays; ask with JSON")
    file = io.BytesIO()
    np.save(file, answer.values, allow_pickle=False)
    return file.getvalue(), _NPY


def _model(name: str, factory: bool):
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--model is {name!r}; expected module:attribute, such as my_package.models:predict")
    found = operator.attrgetter(attribute)(importlib.import_module(module))
    return found() if factory else found


def _code(args):
    return _CODES[args.code](args.num_data, args.num_workers)


def _policy(args):
    number = args.answers or math.ceil((args.num_data + args.num_workers) / 2)
    policy = stop.answers(number)
    if args.deadline is not None:
        policy = policy | stop.deadline(args.deadline)
    if args.error_below is not None:
        policy = policy | stop.error_below(args.error_below)
    return policy


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxcode.serve",
        description="Serves a model over HTTP, coded over Ray workers: answers come although workers are late or dead.",
    )
    add = parser.add_argument

    def number(name: str, default: float | None, text: str, kind: type = int) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        add(name, type=_positive(kind), default=default, metavar="n", help=text + shown)

    add(
        "--model",
        required=True,
        metavar="module:attribute",
        help="a function of a batch, an nnx module or a pair (linen module, variables)",
    )
    add("--factory", action="store_true", help="the attribute is a function without arguments that returns the model")
    add("--code", choices=sorted(_CODES), default="systematic", help="where workers sit (default: %(default)s)")
    number("--num-data", 20, "K, inputs coded together")
    number("--num-workers", 30, "N, worker processes")
    add("--output", choices=sorted(_OUTPUTS), default="as-returned", help="space to decode in (default: %(default)s)")
    add("--no-order", action="store_true", help="code inputs in the order they come in, instead of like beside like")
    number("--answers", None, "answers to wait for (default: halfway between K and N)")
    number("--deadline", None, "seconds after which whatever can be decoded is answered", float)
    number("--error-below", None, "predicted error that is good enough, for all inputs of a batch", float)
    number("--time-limit", 30.0, "seconds after which a request is refused", float)
    add("--input-shape", type=_shape, metavar="n,n,...", help="of one input: others are refused, and workers warm up")
    add("--dtype", default="float32", help="of inputs (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: %(default)s)")
    number("--port", 8000, "port to listen at")
    number("--max-body", 64.0, "longest body of a request, in MiB", float)
    number("--max-in-flight", 8, "requests that are worked on at a time; others wait")
    add("--address", help="of a running Ray cluster; one of this machine alone is started if not given")
    add("--num-cpus", type=float, default=0, help="processors that Ray reserves for a worker (default: %(default)s)")
    add("--num-gpus", type=float, default=0, help="GPUs that Ray reserves for a worker (default: %(default)s)")
    return parser


def _positive(kind):
    def read(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above zero, got {text}")
        return value

    read.__name__ = kind.__name__
    return read


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(int)(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 28,28,1, got {text!r}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
