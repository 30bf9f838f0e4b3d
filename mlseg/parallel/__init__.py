"""Several processes that train one program together, each on its share of every batch.

``torchrun --nproc-per-node=2 -m mlseg.run CONFIG`` starts them: gloo between CPUs, NCCL between
GPUs, the same code. What the levels keep, weights, buffers, optimizers' states, is the same in all
of them, bit for bit; batches are shared out, and what is computed of a share is averaged. A loss
that is a mean over the examples of a batch is the mean of the losses of its equal shares, and so is
every derivative of it, of any order. A loss that isn't takes :func:`summed` for its sums.

Alone, every function here gives back what it was given: no collective, no copy, no waiting.

:func:`summed` is differentiable any number of times: the derivative of a sum over processes is the
sum over processes of the derivatives. All of them have to differentiate it then, in the same order,
and to average what they find: each finds the derivative of the sum of everybody's losses by its own
copy of the variables.
"""

from mlseg.parallel.processes import (
    Launch,
    Lost,
    abandon,
    is_first,
    launch,
    local_device,
    local_size,
    rank,
    several,
    size,
    speaks,
    start,
    stop,
)
from mlseg.parallel.shares import (
    Part,
    as_mean,
    join,
    part,
    part_of_share,
    ratio,
    require_equal_parts,
)
from mlseg.parallel.tensors import (
    average,
    average_some,
    averaged,
    collectives,
    copy_from_first,
    summed,
)
from mlseg.parallel.values import (
    done_by_first,
    end_of_questions,
    from_first,
    gather,
    most,
    together,
)

__all__ = [
    "Launch",
    "Lost",
    "Part",
    "abandon",
    "as_mean",
    "average",
    "average_some",
    "averaged",
    "collectives",
    "copy_from_first",
    "done_by_first",
    "end_of_questions",
    "from_first",
    "gather",
    "is_first",
    "join",
    "launch",
    "local_device",
    "local_size",
    "most",
    "part",
    "part_of_share",
    "rank",
    "ratio",
    "require_equal_parts",
    "several",
    "size",
    "speaks",
    "start",
    "stop",
    "summed",
    "together",
]
