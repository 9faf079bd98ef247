"""Modules that do not depend on the spec. They are copied unchanged, below a header, into every generated package.

They import torch, triton and each other (relatively), but nothing of the generator.
"""
