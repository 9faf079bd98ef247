"""Measured over modelled time of each kernel, on NVIDIA H100 80GB HBM3.

Written by `python tools/calibrate.py docs/results/h100_2026-11-22_key_major/bench.json --write`.
"""

FACTORS: dict[str, float] = {
    "block_scores": 1.08,
    "combine_backward": 0.89,
    "combine_forward": 0.79,
    "compressed_backward_dkdv": 0.94,
    "compressed_backward_dq": 0.73,
    "compressed_forward": 0.85,
    "index_keys": 1.33,
    "linear_backward_input": 1.68,
    "linear_backward_weight": 2.32,
    "linear_forward": 0.58,
    "merge_dq": 1.18,
    "merge_outputs": 0.89,
    "pool_backward_input": 5.55,
    "pool_forward": 3.18,
    "select_blocks": 3.89,
    "selected_backward_dkdv": 1.35,
    "selected_forward": 0.89,
    "selected_forward_key_major": 1.23,
    "window_backward_dkdv": 0.85,
    "window_backward_dq": 0.76,
    "window_forward": 1.0,
}
