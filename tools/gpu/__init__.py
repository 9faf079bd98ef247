"""Measurements that need a GPU. Checks that need one are tests: `pytest -m gpu`."""
