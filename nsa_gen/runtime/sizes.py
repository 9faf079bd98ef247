"""Arithmetic of sizes on the host, where Triton's functions of these names take microseconds a call."""


def cdiv(total: int, size: int) -> int:
    """How many pieces of `size` cover `total`."""
    return -(-total // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
