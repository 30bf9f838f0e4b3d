"""Pieces of work in processes of this machine or on Ray, behind one interface, :class:`Pool`."""

from mlseg.workers.local import Processes
from mlseg.workers.pool import Died, Ended, Here, Pool, Raised, Returned, make_pool
from mlseg.workers.sharing import HELD, STOPPED, Failed, Tally, Work, shard, work_off

__all__ = [
    "HELD",
    "STOPPED",
    "Died",
    "Ended",
    "Failed",
    "Here",
    "Pool",
    "Processes",
    "Raised",
    "Returned",
    "Tally",
    "Work",
    "make_pool",
    "shard",
    "work_off",
]
