"""Tests the serving benchmark: its delays, and a run of all schemes on threads in place of processes."""

import csv
import time

import numpy as np
import pytest
from flax import nnx
from scipy import stats

import jaxcode as jc
from models import serialization, serve_bench
from models.lenet5 import LeNet5
from models.serve_bench import Delays, main


def double(x):
    return 2 * x


@pytest.mark.parametrize(
    ("delays", "law"),
    [
        (Delays("pareto", 0.02, 1.5, np.inf, 0), stats.pareto(1.5, scale=0.02)),
        (Delays("lognormal", 0.02, 0.7, np.inf, 0), stats.lognorm(0.7, scale=0.02)),
    ],
    ids=["Pareto", "lognormal"],
)
def test_delays_follow_their_law_up_to_the_longest(delays, law):
    seconds = delays.draw(np.random.default_rng(1), 2000)
    assert stats.kstest(seconds, law.cdf).pvalue > 1e-3
    assert delays.quantile(0.95) == pytest.approx(law.ppf(0.95), rel=0.02)
    truncated = Delays(delays.law, delays.scale, delays.tail, 0.05, 0)
    assert truncated.draw(np.random.default_rng(1), 2000).max() == 0.05


def test_each_worker_sleeps_for_delays_of_its_own_before_it_computes():
    delays = Delays("lognormal", 0.02, 0.5, 1.0, seed=5)
    durations = []
    for worker in (0, 1, 0):
        start_time = time.monotonic()
        assert delays(worker, double, 2) == 4
        durations.append(time.monotonic() - start_time)
    expected = [delays.draw(np.random.default_rng((5, worker)), 1)[0] for worker in (0, 1)]
    assert durations[0] >= expected[0]
    assert durations[1] >= expected[1]
    assert expected[0] != expected[1]


def test_all_schemes_are_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lenet5.safetensors"
    serialization.save(LeNet5(rngs=nnx.Rngs(0)), path)
    # Processes and tuning have their own tests.
    monkeypatch.setattr(serve_bench.jc.pools, "RayPool", jc.pools.ThreadPool)
    code = jc.SplineCode.repeated(2, 4)
    candidate = jc.tuning.Candidate("repeated", "as given", "", code, jc.outputs.as_returned, 0.0, 0.0, 0.0, 4.0, 1)
    tuned = jc.tuning.Tuned(code, None, jc.outputs.as_returned, None, None, "disagreement", (candidate,), 0)
    monkeypatch.setattr(serve_bench.jc, "tune", lambda *args, **options: tuned)
    settings = "--num-data 2 --num-workers 4 --num-answers 3 --batch-size 4 --num-requests 6 --clients 2 --delay 1"
    main([*settings.split(), "--weights", str(path), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = {line[:22].strip(): line[22:].split() for line in printed.splitlines() if len(line.split()) >= 9}
    for scheme in ("uncoded", "replication", "hedged replication"):
        assert float(rows[scheme][-1]) == 1, printed
    for scheme in ("LeTCC, as published", "ours"):
        assert 0 <= float(rows[scheme][-1]) <= 1
        latencies = [float(cell) for cell in rows[scheme][:4]]
        assert latencies == sorted(latencies)
    with (tmp_path / "latency.csv").open() as file:
        assert sum(1 for _ in csv.reader(file)) == 1 + 5 * 6
    assert (tmp_path / "latency.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-requests 0", "at least 1"),
        ("--num-answers 31", "--num-answers <= --num-workers"),
        ("--batch-size 30", "multiple of --num-data"),
        ("--dataset mnist --data-dir /nowhere", "MNIST needs"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([*arguments.split(), "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
