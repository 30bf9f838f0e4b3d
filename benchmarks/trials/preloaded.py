"""Imports what commands import late, once for all the processes that are forked from this one."""

import aiohttp  # noqa: F401
import fsspec.implementations.http
import fsspec.implementations.local  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.pyplot  # noqa: F401
import scipy.ndimage
import scipy.spatial  # noqa: F401
import torch._dynamo
import torch._inductor
import torch.utils.tensorboard  # noqa: F401
from PIL import Image

import mlseg.data
import mlseg.evaluate
import mlseg.predict
import mlseg.run  # noqa: F401
from mlseg.hypergradients import methods, optimizers  # noqa: F401
from mlseg.problems.systems import all_systems, load_system
from mlseg.segmentation.data.entry import DATA_SETS

Image.init()
DATA_SETS.names()
for _system in all_systems():
    load_system(_system.name)
