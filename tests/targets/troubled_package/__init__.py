"""A stand-in for a generated package whose kernels each have one trouble."""
