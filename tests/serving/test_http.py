"""Tests the HTTP server as its clients see it."""

import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode.serving import Prediction
from jaxcode.serving.http import _to_json, _to_npy

from ..pools.faults import free_port, listening_addresses, running_processes, wait_until
from .model import scores

INPUTS = np.linspace(-1, 1, 5 * 4, dtype=np.float32).reshape(5, 4)
JSON, NPY = "application/json", "application/x-npy"


@contextlib.contextmanager
def serve(arguments, folder):
    """Serves the model in another process; yields its port, the process and its log."""
    port, log = free_port(), folder / "log"
    arguments = f"--model tests.serving.model:scores --input-shape 4 --port {port} {arguments}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxcode.serving", *arguments.split()],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 120
        while "Serving tests.serving.model:scores" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield port, process, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    arguments = "--num-data 4 --num-workers 6 --max-body 0.1 --time-limit 20 --no-order"
    with serve(arguments, tmp_path_factory.mktemp("serve")) as started:
        yield started


def send(server, method="POST", path="/", body=b"", kind=JSON, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", server[0], timeout=60)
    try:
        connection.request(method, path, body, {"content-type": kind, **dict(headers)})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def as_json(x):
    return json.dumps({"inputs": np.asarray(x).tolist()}).encode()


def as_npy(x):
    file = io.BytesIO()
    np.save(file, x, allow_pickle=True)
    return file.getvalue()


def test_a_json_request_gets_a_json_response(server):
    status, _, body = send(server, body=as_json(INPUTS))
    answer = json.loads(body)
    assert status == 200
    np.testing.assert_allclose(answer["outputs"], scores(INPUTS), atol=0.05)
    assert len(answer["error"]) == 5
    assert 5 <= answer["returned"] <= 6
    assert 0 < answer["latency"] < 20


def test_a_numpy_file_gets_a_numpy_file(server):
    status, headers, body = send(server, body=as_npy(INPUTS), kind=NPY)
    assert (status, headers["content-type"]) == (200, NPY)
    np.testing.assert_allclose(np.load(io.BytesIO(body), allow_pickle=False), scores(INPUTS), atol=0.05)


def test_results_in_bfloat16_are_sent_as_float32():
    values = np.array([[0.5, np.inf]]).astype(jnp.bfloat16)
    prediction = Prediction(values, None, np.ones(1, bool), np.ones(6, bool), 0.1, (), None)
    assert json.loads(_to_json(prediction)[0])["outputs"] == [[0.5, None]]
    stored = np.load(io.BytesIO(_to_npy(prediction)[0]), allow_pickle=False)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, values.astype(np.float32))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ({"body": b"{"}, 400, "not JSON"),
        ({"body": b"[1]"}, 400, "not JSON of the form"),
        ({"body": b'{"inputs": [[1, 2, 3, 4], [1]]}'}, 400, "not numbers in equal rows"),
        ({"body": b'{"inputs": [[1' + b"0" * 400 + b", 2, 3, 4]]}"}, 400, "not numbers"),
        ({"body": b'{"inputs": "no"}'}, 400, "not numbers"),
        ({"body": b'{"inputs": []}'}, 400, "expected"),
        ({"body": b'{"inputs": 3}'}, 400, "expected"),
        ({"body": b'{"inputs": [[NaN, 1, 1, 1]]}'}, 400, "NaN"),
        ({"body": as_json(np.ones((2, 3)))}, 400, "expected a batch of inputs of shape (4,)"),
        ({"body": b"no", "kind": NPY}, 400, "not a NumPy file"),
        ({"body": as_npy(np.array([print], object)), "kind": NPY}, 400, "not a NumPy file"),
        ({"body": as_json(INPUTS), "kind": "text/plain"}, 415, "application/json or application/x-npy"),
        ({"body": b" " * 200_000}, 413, "longer than"),
        ({"method": "GET"}, 405, "expected POST"),
        ({"method": "DELETE", "path": "/metrics"}, 405, "expected GET"),
        ({"path": "/elsewhere"}, 404, "nothing at /elsewhere"),
    ],
)
def test_invalid_requests_have_a_status_and_a_message(server, arguments, status, message):
    found_status, headers, body = send(server, **arguments)
    assert found_status == status, body
    assert message in json.loads(body)["error"]
    assert ("allow" in headers) == (status == 405)


def test_a_chunked_body_that_is_too_long_has_status_413(server):
    status, _, _ = send(server, body=iter([b" " * 50_000] * 4))  # sent in chunks
    assert status == 413


def test_health_and_metrics_report_workers_and_requests(server):
    send(server, body=as_json(INPUTS))
    status, _, body = send(server, "GET", "/healthz")
    assert status == 200
    assert sum(json.loads(body)["workers"].values()) == 6
    status, headers, body = send(server, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    answered = next(line for line in body.decode().splitlines() if 'jaxcode_requests_total{outcome="answered"}' in line)
    assert float(answered.split()[-1]) >= 1


def test_it_listens_on_the_loopback_interface_only(server):
    addresses = listening_addresses(lambda process, command: os.getsid(int(process.name)) == os.getsid(server[1].pid))
    assert addresses
    assert all(address.is_loopback for address in addresses), addresses


def test_sigterm_answers_requests_in_flight_and_leaves_no_process(server):
    _, process, log = server
    slow = np.where(np.arange(4) == 0, np.float32(9), INPUTS[:4])
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        futures = [clients.submit(send, server, body=as_json(slow)) for _ in range(2)]
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        answers = [future.result(60) for future in futures]
    for status, _, body in answers:
        assert status == 200, body
    # If Ray Serve takes the replica to be busy, it ends it after twice the time limit.
    assert process.wait(120) == 0, log.read_text()
    with pytest.raises(OSError, match="refused"):
        send(server, "GET", "/healthz")
    # Processes may take a moment to end.
    wait_until(lambda: not running_processes(process.pid), 20)


@pytest.mark.long
def test_what_was_tuned_is_served_from_its_folder(tmp_path):
    """A code with a prior, of which one of four workers is enough: what it does not answer is guessed."""
    x = np.random.default_rng(0).uniform(-1, 1, (400, 4)).astype(np.float32)
    stragglers = jc.stragglers.Uniform(2)
    tuned = jc.tune(
        scores,
        x[:40],
        num_data=4,
        num_workers=6,
        stragglers=stragglers,
        prior=jc.surrogate(scores, x, cost=100.0, progress=False),
        layouts={"replication": jc.ReplicationCode(4, 6)},
        orders={"as given": None},
        progress=False,
    )
    assert tuned.prior is not None
    tuned.save(tmp_path / "tuned")
    with serve(f"--tuned {tmp_path / 'tuned'} --answers 4 --time-limit 20", tmp_path) as started:
        status, _, body = send(started, body=as_json(INPUTS))
    answer = json.loads(body)
    assert status == 200
    exact = np.array(answer["exact"])
    assert 0 < exact.sum() <= 5
    np.testing.assert_allclose(np.array(answer["outputs"])[exact], scores(INPUTS)[exact], atol=1e-5)
    np.testing.assert_allclose(answer["outputs"], scores(INPUTS), atol=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model nowhere:f", "No module named 'nowhere'"),
        ("--model tests.serving.model:f", "no attribute 'f'"),
        ("--model tests.serving.model", "expected module:attribute"),
        ("--model tests.serving.model:scores --num-workers 0", "above zero"),
        ("--model tests.serving.model:scores --answers 31", "expected at most as many"),
        ("--model tests.serving.model:scores --tuned nowhere", "nowhere"),
        ("--model tests.serving.model:scores --input-shape 3,x", "whole numbers such as"),
        ("--model tests.serving.model:scores --num-data 1", "num_data"),
    ],
)
def test_invalid_arguments_end_the_program_before_anything_is_started(arguments, message, capsys, unchecked):
    from jaxcode.serving.http import main

    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
