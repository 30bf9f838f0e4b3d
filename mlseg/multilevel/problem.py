"""Problem: what every level of a multilevel program shares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import betty.configs
import betty.problems
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mlseg import parallel, randomness
from mlseg.errors import RunError, UserError
from mlseg.hypergradients import Hop, Vector
from mlseg.hypergradients.gradient_hooks import applied, silenced
from mlseg.hypergradients.second_order.fused import formulas
from mlseg.hypergradients.second_order.refusals import explained
from mlseg.hypergradients.substitution import check_none_left, substituted
from mlseg.multilevel import graph, restoring
from mlseg.multilevel.betty_tables import carry_by_bettys, is_bettys
from mlseg.multilevel.config import Config, SchedulerClock, method_of
from mlseg.multilevel.loaders import FreshBatches, Place, Stream, check_iterable, check_not_empty
from mlseg.multilevel.outer_gradient import OuterGradient
from mlseg.multilevel.own_names import Shown
from mlseg.multilevel.plain import regroup
from mlseg.multilevel.revisiting import Revisitable
from mlseg.multilevel.sharing import Buffers, own_share, shared_draws
from mlseg.transfer import batch_to_device, state_to_device


class Problem(Revisitable):
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
        self._metrics: dict[str, Any] = {}
        self._moves_buffers_of: set[str] = set()
        """Levels below whose buffers its own loss moved in its first step."""
        self._has_watched = False
        self._start_remembering(method_of(self._config))

    metrics = Shown[dict[str, Any]]()
    """Detached figures of the last step; the engine writes them when it logs."""

    @property
    def revisits(self) -> str | None:
        """The name of a problem whose last step this one evaluates again, beside those of paths."""
        return None

    # ------------------------------------------------------------------ one step

    def one_step_descent(self, batch: Any = None) -> dict[str, Any]:
        """Draw a batch, take the (hyper)gradient, step the optimizer."""
        self._place = None
        if batch is None:
            self.cur_batch = batch = self._next_batch()
        self._set_learning_rates()
        if self._is_differentiated:
            self._step_begins(batch)
        buffers = Buffers(self.again.modules()) if parallel.several() else None
        metrics = self._take_gradient(batch)
        if buffers is not None:
            buffers.average_moved()
        if self._is_differentiated and self.again.is_checked:
            self.again.check(batch, metrics["loss"])
        if self.is_implemented("grad_callback"):
            self.grad_callback()
        if self.gradient_accumulation_boundary():
            parameters = self.trainable_parameters()
            self._gradient_is_complete(batch, parameters)
            self.optimizer_step()
            self._steps_taken += 1
            if self.is_implemented("param_callback"):
                self.param_callback()
            if type(self).zero_grad is Problem.zero_grad:
                _clear(parameters)  # the list is there already
            else:
                self.zero_grad()
        return metrics

    def _next_batch(self) -> Any:
        if self._redrawing is not None:
            self._place = self._redrawing.place()
        try:
            return self.get_batch()
        except StopIteration as error:
            raise RunError(
                f"problem {self.name!r}: its get_batch raised StopIteration: "
                f"its data are used up after batch {self._count - 1}; begin them anew there"
            ) from error

    def _take_gradient(self, batch: Any) -> dict[str, Any]:
        """Evaluate the loss and accumulate its (hyper)gradient into ``.grad``."""
        keeps = self.trajectory.keeps
        keeps_graph = self.trajectory.is_open and self._steps_to_hop() < keeps.graphs
        parameters = self.trainable_parameters() if keeps_graph else []
        # With a graph that is to outlive the step, the optimizer must not write into its leaves.
        leaves = self.trajectory.leaves() if keeps_graph else []
        with (
            explained(self.name),
            substituted(self.again.modules(), parameters, leaves) if keeps_graph else nullcontext(),
        ):
            watched = self._watch_levels_below()
            with formulas(keeps.second_order) if keeps_graph else nullcontext():
                loss, metrics = self.get_loss(batch)
            self._moves_buffers_of = {n for n, b, version in watched if b._version != version}
            if not keeps_graph:
                # Not before the loss, which may freeze and thaw some.
                leaves = parameters = self.trainable_parameters()
            self._check_gradient(loss, leaves)
            if self._is_differentiated:
                self._loss_is_evaluated(batch, loss, parameters, leaves)
            if keeps_graph:
                both = torch.autograd.grad(
                    loss, [*leaves, *parameters], create_graph=True, allow_unused=True
                )
                gradient, left = both[: len(leaves)], both[len(leaves) :]
                check_none_left(self.name, left, "store to weights")
                self.trajectory.add_graph(gradient)
            inputs = self._hop_inputs()
            self.trajectory.taken_along = None
            if inputs:
                self._gradient_with(loss, leaves, inputs)
            elif keeps_graph and not self._paths:
                detached = [None if g is None else g.detach() for g in gradient]
                total: Sequence[Any] = parallel.average_some(detached, leaves)
            else:
                report = self.backward(
                    loss=loss,
                    params=leaves,
                    paths=self._paths,
                    retain_graph=self._retain_graph or keeps_graph,
                    allow_unused=self._allow_unused,
                )
                metrics |= report or {}  # one that was written for Betty returns nothing
                total = [leaf.grad for leaf in leaves]
        if keeps_graph:
            for leaf in leaves:
                leaf.grad = None
            self._accumulate(parameters, total)
        return metrics

    def _watch_levels_below(self) -> list[tuple[str, Tensor, int]]:
        """At the first step, the buffers of levels that its hypergradient passes first."""
        if self._has_watched or not self._paths:
            return []
        self._has_watched = True
        first = {path[1].name: path[1].module for path in self._paths}
        return [(n, b, b._version) for n, module in first.items() for b in module.buffers()]

    def _check_gradient(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Refuse a loss that no gradient can come from."""
        trained = any(p.requires_grad for p in parameters)
        if trained and loss.requires_grad:
            return
        why = (
            "its loss depends on nothing that is trained: it is computed under torch.no_grad(), of "
            "detached tensors, or of levels that are frozen (requires_grad)"
            if trained
            else "all its parameters are frozen (requires_grad) when its training_step returns: "
            "thaw them there, or leave this problem out"
        )
        raise UserError(f"problem {self.name!r} has nothing to step along: {why}")

    def _accumulate(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add whole gradients to ``.grad`` with all the hooks that torch's ``backward`` runs."""
        self.set_grads(parameters, applied(gradients, parameters))
        for p in parameters:
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                hook(p)

    def _set_learning_rates(self) -> None:
        rates = self.learning_rates()
        if rates is None:
            return
        groups = self.optimizer.param_groups
        if len(rates) != len(groups):
            raise UserError(
                f"problem {self.name!r}: learning_rates gives {len(rates)}, its optimizer has "
                f"{len(groups)} parameter groups; give one for each"
            )
        for group, rate in zip(groups, rates, strict=True):
            # A device's number stays there; torch's optimizers take tensors, fused ones float32.
            if rate.device.type == "cpu":
                group["lr"] = float(rate.detach())
            else:
                dtype = torch.float32 if group.get("fused") else rate.dtype
                group["lr"] = rate.detach().to(dtype, copy=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Clip and step; Betty's ``custom_optimizer_step``, if there is one."""
        # Betty's own also keeps what its ``sama`` wants to know.
        if self.method is None or self.is_implemented("custom_optimizer_step"):
            super().optimizer_step(*args, **kwargs)
            return
        if self.gradient_clipping > 0.0:
            self.clip_grad()
        self.optimizer.step()

    def get_loss(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """The loss, divided by the number of accumulated batches, and detached figures."""
        result = self._evaluate(batch)
        metrics = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in result.items()
        }
        loss = result["loss"]
        return (loss / self.gas if self.gas > 1 else loss), metrics

    def training_step_exec(self, batch: Any) -> Tensor:
        """The loss alone, whatever ``training_step`` returns; Betty's methods call this."""
        if self.replaying:
            self.again.restore_randomness()
        return self._evaluate(batch)["loss"]

    def loss(self, batch: Any) -> Tensor:
        """``training_step``'s loss in full precision, for a hypergradient's evaluations."""
        return self._full_loss(batch)

    def _full_loss(self, batch: Any) -> Tensor:
        return _as_dict(self.training_step(batch), self.name)["loss"]

    def _evaluate(self, batch: Any) -> dict[str, Any]:
        return _as_dict(self._in_precision(self.training_step, batch), self.name)

    def _in_precision(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.precision != "bf16":
            return function(*args)
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16):
            return function(*args)

    def backward(
        self,
        loss: Tensor,
        params: Sequence[Tensor],
        paths: Sequence[Sequence[betty.problems.Problem]],
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = True,
    ) -> dict[str, Tensor]:
        """Accumulate the direct gradient and the hypergradient along ``paths`` into ``.grad``.

        Returns:
            the hypergradient's diagnostics: the norm over each hop and what its method reports.
        """
        if not paths or not self._config.first_order:
            if parallel.several():
                self._share_gradient(loss, params, create_graph, retain_graph)
                return {}
            torch.autograd.backward(
                loss, inputs=list(params), create_graph=create_graph, retain_graph=retain_graph
            )
            return {}
        if len(paths) > 1 and all(is_bettys(level) for path in paths for level in path[1:-1]):
            # Betty walks each path by itself, and differences of sums are no sums of differences.
            super().backward(loss, list(params), paths, create_graph, True, allow_unused)
            return {}
        outer = OuterGradient(self, paths)
        with silenced(self.again.modules()):
            gradient, diagnostics = outer(
                loss, params, retain_graph=retain_graph, allow_unused=allow_unused
            )
        self._accumulate(params, gradient)
        return diagnostics

    def _share_gradient(
        self, loss: Tensor, params: Sequence[Tensor], create_graph: bool, retain_graph: bool
    ) -> None:
        """The same in several processes: hooks see the gradient of the whole batch."""
        with silenced(self.again.modules()):
            found = torch.autograd.grad(
                loss,
                list(params),
                create_graph=create_graph,
                retain_graph=retain_graph,
                allow_unused=True,
            )
        self._accumulate(params, parallel.average_some(found, params))

    def set_grads(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Add to ``.grad``, in the memory layout of the parameters.

        ``torch.autograd.grad`` gives gradients in any layout, and fused optimizers go through the
        memory of both side by side: on the CPU they would step along a permuted gradient.
        """
        pairs = zip(params, grads, strict=True)
        super().set_grads(params, [None if g is None else _laid_out(g, p) for p, g in pairs])

    def hypergradient(self, vector: Vector, hop: Hop) -> tuple[list[Vector], dict[str, Tensor]]:
        """Carry an outer gradient over ``hop``, which starts from this level, by its method."""
        if self.method is not None:
            return self.method(vector, hop)
        return carry_by_bettys(vector, self, hop.sources), {}

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
            _move_state(self.optimizer, self.device)

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
            return
        restoring.check(self, state)
        if self.optimizer is not None:
            super().load_state_dict(state)
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
                p.grad = None if gradient is None else gradient.to(p.device)
        if "last_step" in state:
            last = state["last_step"]
            batch = batch_to_device(last["batch"], self.device)
            self.cur_batch = batch if batch is not None else self.cur_batch
            self.again.load(batch, last["random_state"])
        self._recall(state)

    def _module_state(self) -> dict[str, Any]:
        return {"module": self.module.state_dict()}


class NoLossError(UserError, TypeError):
    """A ``training_step`` returned no loss."""


def _as_dict(result: Any, name: str) -> dict[str, Any]:
    values = dict(result) if isinstance(result, Mapping) else {"loss": result}
    loss = values.get("loss")
    if not isinstance(loss, Tensor):
        raise NoLossError(
            f"problem {name!r}: training_step must return the loss, a tensor, or a dict with "
            f"'loss'; its loss is {type(loss).__name__}"
        )
    if loss.numel() != 1 or loss.is_complex():
        raise UserError(
            f"problem {name!r}: training_step returns a loss of shape {tuple(loss.shape)}, "
            f"{loss.dtype}: reduce it to one real number, with mean() or sum()"
        )
    values["loss"] = loss.reshape(())
    return values


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _clear(parameters: Vector) -> None:
    for p in parameters:
        p.grad = None


def _move_state(optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = state_to_device(key, value, group, device)
