"""The tuner: it searches on the GPU at hand, survives bad candidates, never lies, and its results travel.

    shapes, lengths  buckets of calls, and the length that candidates are checked at
    identity         what an entry was made for and with, and how two differ
    candidates       which configurations are worth compiling, by the symbolic space and the cost model
    stage0           compiled ahead of time in parallel: dropped, merged, ranked
    process, worker  the process that measures and may die, seen from outside and from inside
    engine, inputs   what it does: the oracle first, then interleaved times
    backend, crew    quarantine; one worker a GPU
    scoring, search  ratios to the default, noise, halving, schedules against each other
    journal, store   what was found, at once; what was decided, for ever
    session, report  all of it

Importing this package imports neither torch nor triton: both stay in the worker processes.
"""

from nsa_gen.tuning.backend import BackendLost
from nsa_gen.tuning.report import BucketResult, TuneReport
from nsa_gen.tuning.search import EFFORTS
from nsa_gen.tuning.session import Settings, Tools, dry_run, tune
from nsa_gen.tuning.shapes import Bucket
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
