"""One step of a level: its loss, the gradient of it, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import betty.problems
import torch
from torch import Tensor

from mlseg import parallel
from mlseg.compiling import check_called
from mlseg.errors import RunError, UserError
from mlseg.hypergradients import Hop, Vector
from mlseg.hypergradients.gradient_hooks import applied, silenced
from mlseg.hypergradients.second_order.fused import formulas
from mlseg.hypergradients.second_order.refusals import explained
from mlseg.hypergradients.substitution import check_none_left, substituted
from mlseg.multilevel import underflow
from mlseg.multilevel.betty_tables import carry_by_bettys, is_bettys
from mlseg.multilevel.outer_gradient import OuterGradient
from mlseg.multilevel.revisiting import Revisitable
from mlseg.multilevel.sharing import Buffers
from mlseg.transfer import laid_out


class Descending(Revisitable):
    """The part of a :class:`~mlseg.multilevel.problem.Problem` that steps once when it is asked to.

    When that is, with which loaders, and what is saved of it, is the problem's.
    """

    _metrics: dict[str, Any]
    _moves_buffers_of: set[str]
    """Levels below whose buffers its own loss moved in its first step."""
    _has_watched: bool

    def one_step_descent(self, batch: Any = None) -> dict[str, Any]:
        """Draw a batch, take the (hyper)gradient, step the optimizer."""
        self._place = None
        if batch is None:
            self.cur_batch = batch = self._next_batch()
        self._set_learning_rates()
        if self._is_differentiated:
            self._step_begins(batch)
        buffers = Buffers(self.again.modules()) if parallel.several() else None
        metrics, parameters = self._take_gradient(batch)
        check_called(self.name, self.module)
        if buffers is not None:
            buffers.average_moved()
        if self._is_differentiated and self.again.is_checked:
            self.again.check(batch, metrics["loss"])
        if self.is_implemented("grad_callback"):
            self.grad_callback()
            parameters = self.trainable_parameters()  # it may have frozen some
        if self.gradient_accumulation_boundary():
            self._gradient_is_complete(batch, parameters)
            self.optimizer_step()
            self._steps_taken += 1
            if self.is_implemented("param_callback"):
                self.param_callback()
            if type(self).zero_grad is Descending.zero_grad:
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

    def _take_gradient(self, batch: Any) -> tuple[dict[str, Any], Vector]:
        """Evaluate the loss and accumulate its (hyper)gradient into ``.grad``.

        Returns:
            the step's figures, and the parameters that it trains.
        """
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
                # Copies: clipping, hooks and optimizers over lists of tensors write into gradients.
                copies = [None if g is None else g.detach().clone() for g in gradient]
                total: Sequence[Any] = parallel.average_some(copies, leaves)
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
        return metrics, parameters

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
        underflow.clear(self.optimizer)

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
        """Add to ``.grad``, in the memory layout of the parameters and each in memory of its own.

        ``torch.autograd.grad`` gives gradients in any layout, and one tensor by both terms of a
        sum, into which clipping would write twice.
        """
        taken: set[tuple[Any, ...]] = set()
        own: list[Tensor | None] = []
        for p, g in zip(params, grads, strict=True):
            if g is not None and g.layout is torch.strided:
                g = laid_out(g, p)
                # Not by data_ptr(), which a dry run's tensors don't have.
                place = g.untyped_storage()._cdata, g.storage_offset()
                g = g.clone() if place in taken else g
                taken.add(place)
            own.append(g)
        super().set_grads(params, own)

    def hypergradient(self, vector: Vector, hop: Hop) -> tuple[list[Vector], dict[str, Tensor]]:
        """Carry an outer gradient over ``hop``, which starts from this level, by its method."""
        if self.method is not None:
            return self.method(vector, hop)
        return carry_by_bettys(vector, self, hop.sources), {}


class NoLossError(UserError, TypeError):
    """A ``training_step`` returned no loss."""


def _as_dict(result: Any, name: str) -> dict[str, Any]:
    # A tensor first: whether something is a Mapping takes ten times as long to tell.
    several = not isinstance(result, Tensor) and isinstance(result, Mapping)
    values: dict[str, Any] = dict(result) if several else {"loss": result}
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
    if loss.dim():
        values["loss"] = loss.reshape(())
    return values


def _clear(parameters: Vector) -> None:
    for p in parameters:
        p.grad = None
