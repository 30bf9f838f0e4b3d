"""Which finite-difference step suits a network with kinks: hypergradients against secants.

    python benchmarks/secant_check.py RUN [--steps 4] [--shift 0.1]

ReLU, max-pooling and L1 make a network's gradient jump. The exact second derivative, which
``identity`` computes, leaves the jumps out; a finite difference takes in those that it steps over.
What an architecture learner can use is how the lower levels' next step changes when the alphas move
by as much as a few of its updates move them. That is measured here, coordinate by coordinate, with
the step's randomness replayed:

    secant_j = -<v, P (g(A + d e_j) - g(A - d e_j))> / 2 d

with ``g`` the gradient of the level's loss at the weights that its last step started from, ``P``
its optimizer's scale and ``v`` the vector that arrives at the level. For each hop of a checkpointed
E2EAug run (its ``last.pt``) the methods' vectors are compared with it: cosine, ratio of norms,
milliseconds of processor time.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlseg import config
from mlseg.commands import as_script
from mlseg.hypergradients import Hop, Method, pointed_at, resolve
from mlseg.hypergradients.optimizers import one_step_scale
from mlseg.machine import describe, head
from mlseg.multilevel.problem import Problem
from mlseg.problems.systems import parse_run

EPSILONS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0001)


def methods() -> dict[str, Method]:
    """What is compared, by the name shown."""
    found = {}
    for where in ("before_step", "after_step"):
        common = {"scale": "optimizer", "linearise": where}
        found[f"identity, {where}"] = resolve({"method": "identity", **common})
        for epsilon in EPSILONS:
            values = {"method": "finite_difference", "epsilon": epsilon, **common}
            found[f"finite_difference {epsilon:g}, {where}"] = resolve(values)
            if where == "before_step":
                # What `one_sided` gives, bit for bit; the training step's gradient isn't at hand.
                one_sided = resolve({**values, "scheme": "forward"})
                found[f"finite_difference {epsilon:g}, one-sided"] = one_sided
    return found


def secant(level: Problem, alphas: Tensor, vector: list[Tensor], shift: float) -> Tensor:
    """The change of the level's next step along ``vector`` per unit of each alpha."""
    parameters = level.trainable_parameters()
    ones = [torch.ones_like(p) for p in parameters]
    scale = one_step_scale(ones, parameters, level.optimizer, preconditioned=True)

    def gradient() -> list[Tensor]:
        level.again.restore_randomness()
        return list(torch.autograd.grad(level.loss(level.cur_batch), parameters))

    result = torch.zeros_like(alphas)
    flat = result.view(-1)
    before = level.trajectory.steps[-1].weights
    with level.again.untraced(), pointed_at(parameters, before):
        for index in range(alphas.numel()):
            place = alphas.data.view(-1)
            kept = place[index].clone()
            sides = []
            for sign in (1.0, -1.0):
                place[index] = kept + sign * shift
                sides.append(gradient())
            place[index] = kept
            change = sum(
                (v * s * (above - below)).sum()
                for v, s, above, below in zip(vector, scale, *sides, strict=True)
            )
            flat[index] = -change / (2.0 * shift)
    return result


def main() -> None:
    """Print a table per hop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shift", type=float, default=0.1)
    arguments = parser.parse_args()
    settings, build = parse_run(config.load(arguments.run / "config.yaml"))
    engine = build(settings, None)
    engine.resume(arguments.run)
    engine.train()
    by_name: dict[str, Any] = {problem.name: problem for problem in engine.problems}
    generator, segmentor = by_name["generator"], by_name["segmentor"]
    architecture = by_name["architecture"]
    for level in (generator, segmentor):
        assert level.method is not None
        level.method = level.method.model_copy(update={"linearise": "before_step"})
    carried: dict[str, list[Tensor]] = {}

    def watch(level: Problem) -> None:
        original = level.hypergradient

        def spy(vector: list[Tensor], hop: Hop) -> Any:
            carried[level.name] = [v.clone() for v in vector]
            return original(vector, hop)

        setattr(level, "hypergradient", spy)  # noqa: B010

    watch(generator)
    watch(segmentor)
    rows: dict[str, dict[str, list[tuple[float, float, float]]]] = {
        level.name: defaultdict(list) for level in (segmentor, generator)
    }
    for _ in range(arguments.steps):
        engine.iterate()
        for level in (segmentor, generator):
            vector = carried[level.name]
            truth = secant(level, architecture.module.alphas, vector, arguments.shift).flatten()
            for name, method in methods().items():
                if level is segmentor:
                    # The hop used up its graph of the synthetic batch: make the step's again.
                    with segmentor.again.untraced():
                        segmentor.again.restore_randomness()
                        segmentor.replaying = False
                        segmentor.loss(segmentor.cur_batch)
                        segmentor.replaying = True
                started = time.process_time()
                (found,), _ = method(vector, Hop(level, [architecture]))
                spent = 1e3 * (time.process_time() - started)
                value = found[0].flatten()
                cosine = torch.nn.functional.cosine_similarity(value, truth, dim=0)
                rows[level.name][name].append(
                    (float(cosine), float(value.norm() / truth.norm()), spent)
                )
    print(head(describe()))
    print(f"- run: {arguments.run}, {arguments.steps} steps, shift {arguments.shift:g}")
    for level_name, table in rows.items():
        print(f"\n| hop {level_name} to alphas | cosine: mean, each step | norm ratio | ms |")
        print("|---|---|---|---|")
        for name, values in table.items():
            cosines, ratios, spent_ms = zip(*values, strict=True)
            each = " ".join(f"{c:.2f}" for c in cosines)
            print(
                f"| {name} | **{statistics.mean(cosines):.2f}** ({each}) | "
                f"{statistics.median(ratios):.2f} | {statistics.median(spent_ms):.0f} |"
            )


if __name__ == "__main__":
    raise SystemExit(as_script(main))
