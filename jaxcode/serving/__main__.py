"""Serves a model over HTTP: ``python -m jaxcode.serving --model module:attribute``, see `jaxcode.serving.http`."""

import sys

from .http import main

if __name__ == "__main__":
    main(sys.argv[1:])
