"""What packages carry that depends on no spec: modules that are copied into them as they stand, below a header.

They import torch and triton and, relatively, each other; nothing of the generator.
"""
