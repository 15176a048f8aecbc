"""Runs the comparison of defences on digits."""

import pytest

import jaxcode as jc
from models import datasets
from models.defences import main
from models.networks import digits


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    path = tmp_path_factory.mktemp("prior") / "prior.safetensors"
    jc.surrogate(digits(), datasets.load("digits").x_train[:400], progress=False).save(path)
    return str(path)


@pytest.mark.long
def test_the_command_prints_who_was_found(prior, capsys):
    setting = ["--setting", "16,5,2", "--pool", "30", "--runs", "3", "--requests", "40"]
    main([*setting, "--prior", prior])
    printed = capsys.readouterr().out
    for title in ("(16, 5, 2), 2 faulty: copies placed", "(16, 5, 2), 2 faulty: systematic spline code"):
        assert title in printed
    rows = {
        line[:28].strip(): line[28:].split()
        for line in printed.splitlines()
        if line[:10] in ("nobody    ", "sign flips")
    }
    found, requests, all_found, correct, undefended, defended = rows["sign flips"]
    assert float(found) > 0.5
    assert 1 <= float(requests) <= 40
    assert 0 <= float(all_found) <= 1
    assert int(correct) == 0
    assert float(defended) < float(undefended)
    assert len(rows["nobody"]) == 3


@pytest.mark.parametrize(
    "arguments", [["--setting", "3,4,1"], ["--setting", "400,300,1"], ["--prior", "none.safetensors"]]
)
def test_bad_arguments_exit_with_two(arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
