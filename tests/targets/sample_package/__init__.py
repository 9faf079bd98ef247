"""A hand-written stand-in for a generated package: small kernels with every kind of argument a launch may have."""
