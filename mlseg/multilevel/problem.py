"""Problem: what every level of a multilevel program shares."""

from __future__ import annotations

import warnings
from typing import Any

import betty.configs
import betty.problems
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mlseg import parallel, randomness
from mlseg.compiling import compile_module
from mlseg.errors import RunError
from mlseg.multilevel import graph, restoring
from mlseg.multilevel.config import Config, SchedulerClock, method_of
from mlseg.multilevel.descent import Descending
from mlseg.multilevel.loaders import FreshBatches, Place, Stream, check_iterable, check_not_empty
from mlseg.multilevel.own_names import Shown
from mlseg.multilevel.plain import regroup
from mlseg.multilevel.sharing import own_share, shared_draws
from mlseg.transfer import batch_to_device, laid_out, lay_out_state, optimizer_to_device


class Problem(Descending):
    """One level: a module, its optimizer, its data, and the loss in :meth:`training_step`.

    Derive from it and write ``training_step(batch)``, which returns the loss, or a dict of ``loss``
    and figures to log. The engine's other problems are attributes by their names, and are in
    ``self.levels``. A problem written for Betty's ``ImplicitProblem`` works as it is when it
    derives from this class instead.

    What differs from Betty 0.2.1, and why:

    * optimizer and scheduler objects are kept as they were given (Betty rebuilds both and loses
      parameter groups and state), and a scheduler may step per epoch or validation;
    * frozen parameters are left alone; losses may be dicts at every level;
    * when a hypergradient evaluates a step again it sees the same random draw, and buffers
      (BatchNorm statistics) are afterwards what they were;
    * the outer gradient is accumulated over the whole graph at once, each level's hop once, however
      many paths cross it (:mod:`mlseg.multilevel.outer_gradient`);
    * nothing synchronises host and device within a step;
    * ``bf16`` autocast works on the CPU as well.

    Args:
        name: under which the other problems and the engine see this one.
        module: whose parameters are the level's variables.
        optimizer: over (a part of) the module's parameters.
        train_data_loader: any iterable of batches; None where :meth:`get_batch` is overridden.
        config: defaults to ``Config()``.
        scheduler: a learning-rate scheduler of ``optimizer``.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        train_data_loader: Any = None,
        config: betty.configs.Config | None = None,
        scheduler: LRScheduler | None = None,
        extra_config: Any = None,
    ) -> None:
        if isinstance(module, betty.configs.Config):
            raise TypeError(f"problem {name!r}: pass config by keyword, Problem(..., config=...)")
        super().__init__(
            name,
            config if config is not None else Config(),
            module,
            optimizer,
            scheduler,
            train_data_loader,
            extra_config,
        )
        self._inner_loop_start: bool = True
        if self.precision == "fp16":
            raise ValueError(f"problem {name!r}: precision fp16; choose fp32 or bf16")
        self._metrics, self._moves_buffers_of, self._has_watched = {}, set(), False
        self._start_remembering(method_of(self._config))

    metrics = Shown[dict[str, Any]]()
    """Detached figures of the last step; the engine writes them when it logs."""

    @property
    def revisits(self) -> str | None:
        """The name of a problem whose last step this one evaluates again, beside those of paths."""
        return None

    # ------------------------------------------------------------- the step order

    def step_normal(self, global_step: int | None = None) -> None:
        """Step, then let the uppers step when this level has done its ``unroll_steps``."""
        if not self.check_ready():
            return
        if self._inner_loop_start:
            if self.is_implemented("on_inner_loop_start"):
                self.on_inner_loop_start()
            self._inner_loop_start = False
            if self._roll_back:
                self.cache_states()
        if self._training:
            self._count += 1
        self._metrics = self.one_step_descent()
        if self.method is None and not self._roll_back:
            self.step_scheduler("iteration")  # where and when Betty does: with each batch
        if self.log_step > 0 and self._count % self.log_step == 0 and self.is_rank_zero():
            self.log(self._metrics, global_step)
        if (
            self._training
            and self._count % (self._unroll_steps * self.gas) == 0
            and self._count > self.warmup_steps
        ):
            for problem in self._parents:
                problem.ready[problem.children.index(self)] = True
                problem.step_normal(global_step=global_step)
            self._inner_loop_start = True
        ours = self.method is not None and not self._roll_back
        if ours and self.gradient_accumulation_boundary():
            # After the uppers: a hypergradient carries the rate that this step was taken with.
            self.step_scheduler("iteration")
        self.ready = [False] * len(self._children)

    def step_after_roll_back(self) -> None:
        """Take the level's last step again from where its inner loop began (``roll_back``)."""
        if self.check_ready() and self._training:
            if self._roll_back:
                self.recover_states()
                self.one_step_descent(batch=self.cur_batch)
                self.step_scheduler("iteration")
                for problem in self._parents:
                    problem.ready[problem.children.index(self)] = True
                    problem.step_after_roll_back()
            self.ready = [False] * len(self._children)

    def step_scheduler(self, clock: SchedulerClock, metric: float | None = None) -> None:
        """Step the scheduler if this is the clock it goes by.

        Args:
            clock: what has just happened.
            metric: the monitored validation metric, for ``ReduceLROnPlateau``.
        """
        when = getattr(self._config, "scheduler_step", "iteration")
        if self.scheduler is None or clock != when:
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if metric is None:
                raise RunError(
                    f"problem {self.name!r}: reduce_on_plateau needs a validation metric; "
                    "set its step to 'validation' and validate"
                )
            self.scheduler.step(metric)
        else:
            with warnings.catch_warnings():
                # At the first batch of an epoch a resumed run has not stepped its optimizer yet.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.scheduler.step()

    def epoch_callback_exec(self) -> None:
        """One pass over the first loader is over."""
        self.step_scheduler("epoch")
        super().epoch_callback_exec()

    # ------------------------------------------------------------------- wiring

    def initialize(self) -> None:
        """Set up loaders, module, optimizer and scheduler; the engine calls it once."""
        super().initialize()
        if self.optimizer is None and self.trainable_parameters():
            raise ValueError(f"problem {self.name!r} has parameters but no optimizer")
        self._stream = Stream(
            self.name,
            [Place(loader, self.device) for loader in self.train_data_loader or ()],
            self.train_data_iterator or [],
            self.epoch_counter or [],
        )
        for loader in self.train_data_loader or ():
            check_not_empty(self.name, loader)
        self._fresh = FreshBatches(self.name, self._stream, self.device)
        chosen = getattr(self._config, "compile", False)
        if chosen:
            backend = "inductor" if chosen is True else chosen
            compile_module(self.name, self.module, backend)
        if self.method is None:
            # Betty has begun the first pass by now; begin it again, and note from where.
            randomness.restore(self._before_loaders, self.device)
            for index, place in enumerate(self._stream.places):
                self._stream.iterators[index] = place.start_and_wait()
        self.connect()

    def patch_everything(self) -> None:
        """Betty's; its next step is to begin a pass over each loader."""
        super().patch_everything()
        self._before_loaders = randomness.capture(self.device)

    def patch_data_loader(self, loader: Any) -> Any:
        """Betty's, of what can be iterated over."""
        check_iterable(self.name, loader)
        return super().patch_data_loader(loader)

    def patch_optimizer(self) -> None:
        """Keep the optimizer object; only its state follows the module to the device."""
        if self._strategy not in (None, "default", "cpu", "gpu"):
            super().patch_optimizer()
        elif self.optimizer is not None:
            if self.is_implemented("param_groups"):
                regroup(self.optimizer, self.param_groups())
            optimizer_to_device(self.optimizer, self.device)

    def patch_scheduler(self) -> None:
        """Keep the scheduler object, unless ``param_groups`` made other groups than it knows."""
        known = len(getattr(self.scheduler, "base_lrs", ()))
        if known not in (0, len(self.optimizer.param_groups)):
            super().patch_scheduler()

    def set_train_data_loader(self, loader: Any, idx: int = 0) -> None:
        """Replace a loader; the next batch comes from the new one."""
        super().set_train_data_loader(loader, idx)
        self._stream.replace(idx, self.train_data_loader[idx])
        self._fresh.restart()

    def connect(self) -> None:
        """Take note of the dependency graph; the engine calls it whenever the graph changes."""
        self.ready = [False] * len(self._children)
        self._inner_loop_start = True
        everyone = self._everyone()
        self._is_differentiated = graph.is_differentiated(self, everyone) or any(
            isinstance(problem, Problem) and problem.revisits == self.name for problem in everyone
        )
        self._forget_steps()

    # ------------------------------------------------------------- data and state

    def get_batch_single_loader(self, idx: int) -> Any:
        """The next batch of loader ``idx``, counted so that a resumed run finds its place."""
        training = self._stream is self._fresh.training
        at_end = self.epoch_callback_exec if idx == 0 and training else None
        with shared_draws(training):
            batch = self._stream.next(idx, at_end)
        if parallel.several():
            batch = own_share(batch, self._stream.places[idx].loader, self.name)
        batch = batch_to_device(batch, self.device)
        return tuple(batch) if type(batch) is list else batch  # as Betty

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        state = super().state_dict() if self.optimizer is not None else self._module_state()
        state["count"] = self._count
        state["inner_loop_start"] = self._inner_loop_start
        state["ready"] = list(self.ready)
        state["loaders"] = self._stream.state_dict()
        # Figures that a later log is still to write.
        state["metrics"] = {
            k: v for k, v in self._metrics.items() if isinstance(v, (Tensor, int, float))
        }
        if not self.gradient_accumulation_boundary():
            state["gradients"] = [p.grad for p in self.trainable_parameters()]
        state |= self._remembered()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the loaders go on where they were.

        Betty's own, which has neither counts nor places, is taken for what it has.

        Raises:
            ValueError, RuntimeError, KeyError, TypeError: it is of another level.
        """
        if "count" not in state:
            super().load_state_dict(state)
            lay_out_state(self.optimizer)
            return
        restoring.check(self, state)
        if self.optimizer is not None:
            super().load_state_dict(state)
            lay_out_state(self.optimizer)
        else:
            self.module.load_state_dict(state["module"])
        self._count = state["count"]
        self._inner_loop_start = state["inner_loop_start"]
        self.ready = list(state["ready"])
        self._stream.load_state_dict(state["loaders"])
        self._metrics = {
            k: v.to(self.device) if isinstance(v, Tensor) else v
            for k, v in state["metrics"].items()
        }
        if "gradients" in state:
            for p, gradient in zip(self.trainable_parameters(), state["gradients"], strict=True):
                p.grad = None if gradient is None else laid_out(gradient.to(p.device), p)
        if "last_step" in state:
            last = state["last_step"]
            batch = batch_to_device(last["batch"], self.device)
            self.cur_batch = batch if batch is not None else self.cur_batch
            self.again.load(batch, last["random_state"])
        self._recall(state)

    def _module_state(self) -> dict[str, Any]:
        return {"module": self.module.state_dict()}
