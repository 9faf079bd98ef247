"""The pieces of `tools/gpu_suite.py`: a pool of processes, the jobs they run, and the report."""
