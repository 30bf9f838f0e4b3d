"""Where an iteration of E2EAug goes: time and peak memory by part.

    python benchmarks/e2eaug_iteration.py --device cuda --precision fp32 bf16 \\
        --config configs/e2eaug_isic.yaml
    OMP_NUM_THREADS=1 python benchmarks/e2eaug_iteration.py --device cpu \\
        --config configs/e2eaug_isic_small.yaml --iterations 5

One iteration is one step of each level, after pre-training (which is left out: its iteration is the
first two steps of this one). Parts:

* data: drawing the batches of all levels, augmentation included;
* a problem's step: forward, backward, optimizer, without what follows in this list;
* outer gradient: the validation loss's backward pass, and what ties the hops together;
* hop of a problem: carrying the outer gradient through it, towards all that its loss depends on;
* optimizer: all levels' updates;
* rest: the order of steps, the guard against NaN.

How it is measured: ``benchmarks/iteration.py``. Without the data set its stand-in is used; the
figures don't depend on it.
"""

import iteration

if __name__ == "__main__":
    iteration.command(__doc__, "configs/e2eaug_isic_small.yaml", ["gan.pretrain=0"], {})
