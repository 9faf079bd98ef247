"""Measured over modelled time of each kernel, on NVIDIA H100 80GB HBM3.

Written by `python tools/calibrate.py docs/results/h100_2026-11-23_one_loop/bench.json --write`.
"""

FACTORS: dict[str, float] = {
    "block_scores": 1.08,
    "combine_backward": 0.87,
    "combine_forward": 0.8,
    "compressed_backward_dkdv": 0.98,
    "compressed_backward_dq": 0.71,
    "compressed_forward": 0.77,
    "index_keys": 1.34,
    "merge_dkdv": 1.98,
    "merge_dq": 0.92,
    "merge_outputs": 0.88,
    "pool_backward_input": 1.53,
    "pool_forward": 2.78,
    "select_blocks": 3.9,
    "selected_backward_dkdv": 1.1,
    "selected_forward": 0.88,
    "selected_forward_key_major": 1.35,
    "window_backward_dkdv": 0.91,
    "window_backward_dq": 0.84,
    "window_forward": 0.82,
}
