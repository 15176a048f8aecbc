"""Numerical experiments: published statements about coded computing, and what is measured."""
