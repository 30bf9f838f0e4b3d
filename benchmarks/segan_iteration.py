"""Where an iteration of SegAN goes: time and peak memory by part.

    python benchmarks/segan_iteration.py --device cuda --precision fp32 bf16 \\
        --config configs/segan_isic.yaml data.train=100 data.val=8
    OMP_NUM_THREADS=1 python benchmarks/segan_iteration.py --precision fp32 bf16
    python benchmarks/segan_iteration.py --config configs/segan_isic.yaml --iterations 1 \\
        data.train=50 data.val=8

One iteration is one step of each player. Parts:

* data: drawing the batch, augmentation included;
* segmentor: forward: its one forward pass, which serves both steps;
* critic: step: two passes forward and backward, without what is named otherwise;
* clamp: of the critic's parameters;
* segmentor: step: the critic's passes by its new weights, and back through both networks;
* optimizer: both players' updates;
* critic: hop and outer gradient: the Stackelberg variant's alone (game=stackelberg);
* rest: the order of steps, the guard against NaN.

How it is measured: ``benchmarks/iteration.py``. Without the data set its stand-in is used; the
figures don't depend on it.
"""

import iteration

PARTS = {"segmentor.predict": "segmentor: forward", "critic.param_callback": "clamp"}

if __name__ == "__main__":
    iteration.command(__doc__, "configs/segan_isic_small.yaml", [], PARTS)
