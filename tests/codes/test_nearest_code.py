"""The example of the guide to writing a code, which the table of codes runs as the code `outside`."""

import inspect
import pathlib
import re

from jaxcode import AbstractCode

from . import nearest_code

TEXT = pathlib.Path(nearest_code.__file__).read_text()


def test_the_docstring_shows_the_file():
    """But for the quotes of its docstring, which stand inside of another."""
    shown = inspect.cleandoc(AbstractCode.__doc__).split(".. code-block:: python\n")[1].split("\nAttributes:")[0]
    lines = [line.removeprefix("    ") for line in shown.strip("\n").splitlines()]
    assert "\n".join(lines).replace("'''", '"""').strip() == TEXT.strip()


def test_it_is_short_and_uses_public_names_only():
    assert len(TEXT.splitlines()) < 40
    imported = re.findall(r"^(?:import|from) .*", TEXT, re.MULTILINE)
    assert imported == ["import jax.numpy as jnp", "import jaxcode as jc", "from jaxcode import checks, linops"]
    assert not re.search(r"\b(?:jc|checks|linops)\._", TEXT)
