"""Problems written for Betty, on their own or derived from ours: refused in a line, or as there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import betty.configs
import betty.engine
import pytest
import tiny
import torch
from betty.problems import ImplicitProblem, IterativeProblem
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from mlseg.engines.engine import Engine
from mlseg.errors import RunError, UserError
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem

BASES = [ImplicitProblem, Problem]


def data(shuffle: bool = False) -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator).double()
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4, shuffle=shuffle)


def lower_loss(self: Any, batch: Any) -> Tensor:
    x, y = batch
    loss = functional.cross_entropy(self.module(x), y, reduction="none")
    return (loss * self.up(loss.detach().unsqueeze(1)).sigmoid().squeeze(1)).mean()


def upper_loss(self: Any, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(self.low(x), y)


def problems(
    base: type,
    optimizer: Callable[..., Any] = lambda p: SGD(p, 0.1, momentum=0.9),
    scheduler: Any = None,
    own: Any = None,
    shuffle: bool = False,
    up: Any = None,
    **config: Any,
) -> list[Any]:
    """Upper and lower level; ``own`` are attributes of the lower one's class."""
    torch.manual_seed(0)
    below, above = nn.Linear(3, 2).double(), nn.Linear(1, 1).double()
    low_optimizer = optimizer(below.parameters())
    Low = type("Low", (base,), {"training_step": lower_loss, **(own or {})})
    Up = type("Up", (base,), {"training_step": upper_loss})
    low = Low(
        name="low",
        module=below,
        optimizer=low_optimizer,
        scheduler=scheduler and scheduler(low_optimizer),
        train_data_loader=data(shuffle),
        config=betty.configs.Config(**config),
    )
    top = Up(
        name="up",
        module=above,
        optimizer=Adam(above.parameters(), 0.1),
        train_data_loader=data(),
        config=betty.configs.Config(**(up or {})),
    )
    return [top, low]


def edges(made: list[Any]) -> dict[str, Any]:
    top, low = made
    return {"u2l": {top: [low]}, "l2u": {low: [top]}}


def engine(made: list[Any], iterations: int = 12, bettys: bool = False, **options: Any) -> Any:
    roll_back = options.pop("roll_back", False)
    config = betty.configs.EngineConfig(
        train_iters=iterations, valid_step=5, strategy="cpu", roll_back=roll_back
    )
    dependencies = options.pop("dependencies", None) or edges(made)
    if bettys:
        return betty.engine.Engine(made, config, dependencies)
    return Engine(made, config, dependencies, quiet=True, **options)


def trained(base: type, bettys: bool, **options: Any) -> dict[str, Tensor]:
    roll_back = options.pop("roll_back", False)
    made = engine(problems(base, **options), bettys=bettys, roll_back=roll_back)
    made.run()
    return tiny.weights(made)


def own_groups(self: Any) -> list[dict[str, Any]]:
    return [{"params": [self.module.weight], "lr": 0.5}, {"params": [self.module.bias]}]


SAME: dict[str, dict[str, Any]] = {
    "darts": {},
    "darts_alpha": {"darts_alpha": 0.1},
    "darts_multitask": {"darts_multitask": True},
    "sama": {"type": "sama", "optimizer": lambda p: Adam(p, 1e-2), "sama_adam_alpha": 0.1},
    "sama_multitask": {"type": "sama", "sama_multitask": True},
    "a shuffled loader": {"shuffle": True},
    "schedule by batches": {"scheduler": lambda o: StepLR(o, 4), "gradient_accumulation": 3},
    "sama and schedule": {
        "type": "sama",
        "optimizer": lambda p: Adam(p, 1e-2),
        "scheduler": lambda o: StepLR(o, 2),
    },
    "groups": {"own": {"param_groups": own_groups}},
    "groups and schedule": {
        "own": {"param_groups": own_groups},
        "scheduler": lambda o: StepLR(o, 4),
    },
    "rolled back": {"roll_back": True, "unroll_steps": 2, "scheduler": lambda o: StepLR(o, 4)},
    "no hypergradient": {"up": {"first_order": False}},
    "warm-up": {"warmup_steps": 5},
    "a callback": {
        "own": {"grad_callback": lambda self: [p.grad.mul_(0.5) for p in self.parameters()]}
    },
    "a step of one's own": {
        "own": {
            "custom_optimizer_step": lambda self: [
                p.data.sub_(p.grad, alpha=0.3) for p in self.parameters()
            ]
        }
    },
    "names of ours": {
        "own": {
            "loss": lambda self, x: x,
            "on_inner_loop_start": lambda self: setattr(self, "metrics", [self.count]),
        }
    },
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", sorted(SAME))
def test_as_on_betty(base: type, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("betty.logging.logger_base.LoggerBase.info", lambda *args: None)
    theirs, ours = trained(ImplicitProblem, True, **SAME[case]), trained(base, False, **SAME[case])
    for name, value in theirs.items():
        # A rounding unit of 1e-16, over the step of 1e-2 that darts takes, for some 100 sums.
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-11)


def test_the_cases_differ_from_each_other() -> None:
    """Each setting does something, so that leaving it out would be seen."""
    without = trained(Problem, False)
    for case, options in SAME.items():
        if case not in ("darts", "names of ours"):
            found = trained(Problem, False, **options)
            assert any(not torch.equal(found[n], without[n]) for n in without), case


# ------------------------------------------------------------------------------- one line


def refusal(make: Callable[[], Any], kind: type[Exception] = UserError) -> str:
    with pytest.raises(kind) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


EVERYWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"unroll_steps": 0}, "'low': unroll_steps 0; a whole number, at least 1"),
    "no batch": ({"gradient_accumulation": 0}, "'low': gradient_accumulation 0"),
    "precision": ({"precision": "fp8"}, "'low': precision 'fp8'; choose fp32 or bf16"),
    "reinforce": ({"type": "reinforce"}, "type 'reinforce' is empty in betty-ml 0.2; choose darts"),
    "no method": ({"type": "magic"}, "type 'magic' is no method; choose one of cg, darts"),
    "rmsprop": (
        {"type": "sama", "optimizer": RMSprop},
        "type 'sama' of Betty's doesn't know RMSprop; derive the level from mlseg.Problem",
    ),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", sorted(EVERYWHERE))
def test_what_can_not_be_trained_is_said_before(base: type, case: str) -> None:
    options, words = EVERYWHERE[case]
    assert words in refusal(lambda: engine(problems(base, **options)))


PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "AdamW": ({"optimizer": AdamW}, "makes its optimizer anew and can't with AdamW"),
    "plateau": ({"scheduler": ReduceLROnPlateau}, "makes its scheduler anew and can't with Reduce"),
    "cycle": (
        {"scheduler": lambda o: OneCycleLR(o, 0.1, total_steps=9)},
        "makes its scheduler anew and can't with OneCycleLR",
    ),
    "ours": ({"type": "identity"}, "type 'identity' is a method of mlseg's; derive the level"),
    "fp16": ({"precision": "fp16"}, "precision fp16 needs CUDA; choose fp32"),
}


@pytest.mark.parametrize("case", sorted(PLAIN))
def test_what_plain_problems_can_not(case: str) -> None:
    options, words = PLAIN[case]
    assert words in refusal(lambda: engine(problems(ImplicitProblem, **options)))


def test_a_plateau_goes_by_validations() -> None:
    made = problems(Problem, scheduler=ReduceLROnPlateau)
    assert "mlseg.Config(scheduler_step='validation')" in refusal(lambda: engine(made))


@pytest.mark.parametrize("kind", ["cg", "neumann"])
@pytest.mark.parametrize("base", BASES)
def test_bettys_solvers_in_the_middle(base: type, kind: str) -> None:
    top, middle = problems(base, type=kind)
    bottom = problems(base)[1]
    bottom._name = "bottom"
    graph = {"u2l": {top: [middle], middle: [bottom]}, "l2u": {bottom: [middle], middle: [top]}}
    said = refusal(lambda: engine([top, middle, bottom], dependencies=graph))
    assert f"type {kind!r} of Betty's can't be in the middle of three levels" in said


def test_iterative_problems() -> None:
    module = nn.Linear(1, 1)
    made = IterativeProblem("one", betty.configs.Config(), module, SGD(module.parameters(), 0.1))
    said = refusal(lambda: Engine([made], betty.configs.EngineConfig(), {"u2l": {}, "l2u": {}}))
    assert "Betty's IterativeProblem doesn't run" in said


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("module", "'low' has no module; give it one, or define configure_module"),
        ("train_data_loader", "'low' has no data; give it a train_data_loader, or define get_"),
    ],
)
def test_what_a_problem_lacks(base: type, lacking: str, words: str) -> None:
    top, low = problems(base)
    setattr(low, lacking, None)
    assert words in refusal(lambda: engine([top, low]))


def test_a_plain_problem_without_an_optimizer() -> None:
    top, low = problems(ImplicitProblem)
    low.optimizer = None
    assert "'low' has no optimizer" in refusal(lambda: engine([top, low]))


def test_a_problem_of_another_engine() -> None:
    made = problems(ImplicitProblem)
    engine(made)
    assert "'up' belongs to another engine already" in refusal(lambda: engine(made))


def graphs(top: Any, low: Any, other: Any) -> dict[str, tuple[Any, str]]:
    def both(u2l: Any, l2u: Any) -> Any:
        return {"u2l": u2l, "l2u": l2u}

    return {
        "no path": (both({top: [low]}, {}), "'up' depends on 'low', but l2u has no path from"),
        "cycle": (both({}, {top: [low], low: [top]}), "'up' is above itself"),
        "itself": (both({}, {low: [low]}), "'low' is above itself"),
        "twice": (both({}, {low: [top, top]}), "l2u: 'low' names a problem twice"),
        "foreign": (both({top: [other]}, {low: [top]}), "'low' is none of the engine's problems"),
        "by name": (both({"up": ["low"]}, {}), "u2l: 'up' is none of the engine's problems"),
        "no list": (both({top: low}, {low: [top]}), "u2l: of each problem a list of problems"),
        "half": ({"u2l": {}}, "a dict of 'u2l' and 'l2u' is needed; it has 'u2l'"),
        "misspelt": ({"u2L": {}, "l2u": {}}, "it has 'u2L', 'l2u'"),
    }


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", sorted(graphs(None, None, None)))
def test_graphs_that_are_none(base: type, case: str) -> None:
    top, low = problems(base)
    graph, words = graphs(top, low, problems(base)[1])[case]
    assert words in refusal(lambda: engine([top, low], dependencies=graph))


def test_a_dict_where_bettys_methods_want_a_tensor() -> None:
    own = {"training_step": lambda self, batch: {"loss": lower_loss(self, batch)}}
    made = engine(problems(ImplicitProblem, own=own))
    said = refusal(made.run, RunError)
    assert "'low': its training_step returns a dict, which Betty's darts can't" in said
    engine(problems(Problem, own=own)).run()


def test_parameters_that_are_to_be_used() -> None:
    made = engine(problems(Problem, up={"allow_unused": False}))
    assert "'up': its loss doesn't use all of its own parameters" in refusal(made.run, RunError)


TAKEN = {"method": "x", "again": 1, "trajectory": [], "hop_memory": 0, "interface": "x"}
TAKEN |= {"levels": 3, "unroll_steps": 5, "stepping": 1, "sources": [], "replaying": "yes"}


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_what_a_problem_of_ours_keeps_is_not_overwritten(name: str) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        setattr(self, name, TAKEN[name])
        return lower_loss(self, batch)

    engine(problems(ImplicitProblem, own={"training_step": step})).run()
    made = engine(problems(Problem, own={"training_step": step}))
    assert f"Low: {name!r} is a name of mlseg's Problem already" in refusal(made.run)


PRIVATE = ["_full_loss", "_take_gradient"]


@pytest.mark.parametrize(
    "name", ["hypergradient", "connect", "sources", "step_scheduler", *PRIVATE]
)
def test_what_a_problem_of_ours_calls_is_not_overridden(name: str) -> None:
    own = {name: lambda self, *args: None}
    engine(problems(ImplicitProblem, own=own))
    said = refusal(lambda: engine(problems(Problem, own=own)))
    assert f"Low: {name!r} is a method of mlseg's Problem already" in said


ALONE: dict[str, Any] = {
    "cg_alpha": 0.1,
    "sama_adam_alpha": 0.1,
    "darts_multitask": True,
    "sama_multitask": True,
}
ALONE |= {"initial_dynamic_scale": 2.0, "scale_factor": 3.0, "darts_alpha": 0.1}


@pytest.mark.parametrize("name", sorted(ALONE))
def test_no_setting_of_bettys_is_taken_and_ignored(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is a setting of ") as caught:
        Config(**{name: ALONE[name]})
    assert "\n" not in str(caught.value)


def test_every_field_of_bettys_config_is_used_or_refused() -> None:
    """None is left that our ``Config`` takes and that nothing reads."""
    from mlseg.multilevel.config import _BETTYS_ALONE, _BETTYS_SETTINGS

    used = {"type", "unroll_steps", "first_order", "retain_graph", "allow_unused", "precision"}
    used |= {"gradient_accumulation", "gradient_clipping", "warmup_steps", "log_step"}
    used |= {"log_local_step"}
    fields = set(betty.configs.Config.__dataclass_fields__)
    assert fields == used | _BETTYS_ALONE.keys() | _BETTYS_SETTINGS.keys()


# -------------------------------------------------------------------------------- in between


def test_another_graph_in_between() -> None:
    results = []
    for bettys, base in ((True, ImplicitProblem), (False, ImplicitProblem), (False, Problem)):
        made = engine(problems(base), bettys=bettys)
        made.run()
        top, low = made.problems
        made.set_dependency({"u2l": {}, "l2u": {low: [top]}})
        made.run()
        made.set_dependency(edges([top, low]))
        made.run()
        results.append(tiny.weights(made))
    for found in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11)


def test_a_state_that_betty_saved_is_loaded() -> None:
    theirs = engine(problems(ImplicitProblem), bettys=True)
    theirs.run()
    ours = engine(problems(Problem))
    for problem, other in zip(ours.problems, theirs.problems, strict=True):
        problem.load_state_dict(other.state_dict())
        for a, b in zip(problem.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        assert re.match(r"\{0: ", str(problem.optimizer.state_dict()["state"]))


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_shuffled_pass_goes_on_where_it_was(stop: int, tmp_path: Path) -> None:
    """Betty begins the first one while it sets up, long before its first batch is drawn."""
    seen: dict[str, list[Any]] = {}

    def made(name: str, iterations: int) -> Any:
        def step(self: Any, batch: Any) -> Tensor:
            if not self.replaying:
                seen.setdefault(name, []).append(batch[0][:, 0].tolist())
            return lower_loss(self, batch)

        own = {"training_step": step}
        levels = problems(Problem, own=own, shuffle=True, unroll_steps=2)
        return engine(levels, iterations, out=tmp_path / name)

    through = made("through", 8)
    through.run()
    made("stopped", stop).run()
    (tmp_path / "again").symlink_to(tmp_path / "stopped")
    again = made("again", 8)
    again.resume(tmp_path / "again")
    again.run()
    assert seen["stopped"] + seen["again"] == seen["through"]
    assert tiny.same(tiny.weights(again), tiny.weights(through))
