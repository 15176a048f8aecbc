"""Runs the learning curve on digits, and checks its expected losses by drawing straggler sets."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode.surrogates import distil
from models.learning_curve import expected_loss, main

from ..surrogates.cases import line_surrogate


@pytest.mark.parametrize(("setting", "batch_size"), [((8, 5, 2), 5), ((8, 5, 2), 20), ((5, 5, 1), 10)])
def test_the_expected_loss_is_the_mean_over_straggler_sets(setting, batch_size):
    num_workers, num_data, num_late = setting
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, (60, 2)).astype(np.float32)
    prior = line_surrogate()
    # A model that names the other class where the prior's guess is wrong.
    is_wrong = rng.uniform(size=60) < 0.3
    guesses = prior(x)
    answers = jnp.where(is_wrong[:, None], guesses[:, ::-1], guesses)
    risk = np.asarray(prior.with_risk(x, "disagreement")[1])
    found = expected_loss(risk, prior.cost, is_wrong, setting, batch_size)

    def f(batch):
        """Looks answers up by the inputs themselves."""
        return answers[jnp.argmin(jnp.sum((batch[:, None] - x[None]) ** 2, axis=2), axis=1)]

    stragglers = jc.stragglers.Uniform(num_late)
    code = jc.ReplicationCode(num_data, num_workers)
    predict = jc.coded(f, code, prior=prior, stragglers=stragglers, loss="disagreement")
    masks = jax.vmap(lambda key: stragglers.sample(key, num_workers))(jax.random.split(jax.random.key(0), 2000))
    run = jax.jit(jax.vmap(predict, (None, 0)))
    losses = [
        1 - jc.metrics.agreement(results, jnp.broadcast_to(answers[start : start + batch_size], results.shape))
        for start in range(0, 60, batch_size)
        for results in [run(x[start : start + batch_size], masks)]
    ]
    assert float(np.mean(losses)) == pytest.approx(float(found.guessed.mean()), rel=0.1)
    lost = np.mean([1 - code.recovered(mask) for mask in np.asarray(masks[:500])])
    assert lost == pytest.approx(found.replication, rel=0.1)
    assert found.same_work <= found.replication


@pytest.mark.long
def test_the_command_prints_every_surrogate_and_writes_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distil, "_LEAST_STEPS", 60)
    monkeypatch.setattr(distil, "_MAX_STEPS", 60)
    main(["--inputs", "200", "600", "--setting", "12,8,2", "--cost", "0.1", "0.3", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for label in ("600 answers, the network's training images", "200 answers, images it was not trained on"):
        assert label in printed
    assert "600 answers, 200, then passing answers" in printed
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert len(rows) == 5 * 2
    costs = sorted(float(row["cost"]) for row in rows)
    assert costs[-1] > 1.5 * costs[0]
    assert "at the same work" in printed
    assert {row["B"] for row in rows} == {"8", "200"}
    for row in rows:
        assert 0 <= float(row["multiple of replication's loss"]) <= float(row["at the same work"]) < 1
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("arguments", [["--inputs", "600", "200"], ["--inputs", "5"], ["--setting", "3,4,1"]])
def test_bad_arguments_exit_with_two(arguments, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--out", str(tmp_path)])
