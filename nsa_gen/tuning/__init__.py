"""The tuner: it searches on the GPU at hand, survives bad candidates, never lies, and its results travel.

    space     buckets of calls, and which configurations are worth compiling, by the symbolic space and the cost model
    identity  what an entry was made for and with, and how two differ
    stage0    compiled ahead of time in parallel: dropped, merged, ranked
    backend   one measuring process a GPU, each of which may die; quarantine
    engine    that process from inside: the oracle first, then interleaved times; inputs, solo: what is timed
    race      candidates and their times: ratios to the default, and noise
    search    halving, schedules against each other, and a final
    journal   what was found, at once; store: what was decided, for ever; cache: which entry serves a call, and why
    run       all of it, from settings to a report

Importing this package imports neither torch nor triton: both stay in the worker processes.
"""

from nsa_gen.tuning.backend import BackendLost
from nsa_gen.tuning.report import BucketResult, TuneReport
from nsa_gen.tuning.run import Settings, Tools, dry_run, tune
from nsa_gen.tuning.search import EFFORTS
from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.store import Entry, Store

__all__ = [
    "EFFORTS",
    "BackendLost",
    "Bucket",
    "BucketResult",
    "Entry",
    "Settings",
    "Store",
    "Tools",
    "TuneReport",
    "dry_run",
    "tune",
]
