"""One step of a training: its batch, and the loss and gradient, which processes compute together."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ndm_ct._core.errors import PredictorError
from ndm_ct._core.parallel import is_sharded, whole
from ndm_ct._core.precision import networks_in
from ndm_ct._core.seeds import derive_seeds, seed_networks
from ndm_ct.data.sources import Source
from ndm_ct.guidance import nulled
from ndm_ct.nn import null_of
from ndm_ct.training.settings import PRECISIONS
from ndm_ct.training.state import State

__all__ = ["Gradient", "clip_gradients", "validate_weights"]

# Last words of the seeds, one per use of randomness. numpy pads short seeds with zeros, so none of them is 0.
_EPOCH, _VALIDATION, _PART = 1, 2, 3


class Gradient:
    """The loss of each step and its gradient in the parameters.

    Args:
        state: state of the training.
        data: rows to train on.
        remark: sentence that is added to error messages.
        weights: of the rows, with mean 1; None weighs them equally.
    """

    def __init__(self, state: State, data: Source, remark: str, weights: Tensor | None = None) -> None:
        self.weights = weights
        self.state, self.settings, self.group = state, state.settings, state.group
        self.data, self.remark = data, remark
        self.size = data.bins.size
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))

    def compute(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this step's batch, and the objective's next state. The gradient is put into the parameters.

        The batch is split into parts, shared among processes. Each part starts from the same objective state, and the
        new state is their mean, so the result does not depend on which process handles which part.

        Raises:
            PredictorError: the network's output was wrong.
            RuntimeError: another process failed.
        """
        state, rows, before = self.state, self._rows(), self.state.objective_state()
        total, failure = torch.zeros((), dtype=torch.float64, device=state.device), None
        after = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in before.items()}
        try:
            for part, own in self.group.share(rows.tensor_split(self.settings.accumulate)):
                loss = self._loss(part, own) * (len(own) / len(rows))
                (loss / self.size).backward()  # nats per dimension, so that one grad_clip suits every event
                total += loss.detach()
                for name, tensor in state.objective_state().items():
                    after[name] += tensor
                state.set_objective_state(before)
        except PredictorError as error:  # the other processes have to know
            failure = PredictorError(f"at step {state.step}: {error}{self.remark}")
            failure.__cause__ = error
        finally:
            state.set_objective_state(before)  # until the step is done
        if self.group.any(failure is not None, state.device):
            raise failure or RuntimeError(f"another process failed at step {state.step}.{self.remark}")
        self._sum_gradients(total)
        self.group.sum_(list(after.values()))
        return total, {name: _like(after[name] / self.settings.accumulate, before[name]) for name in before}

    def _sum_gradients(self, total: Tensor) -> None:
        """Sum over the processes. Parameters that no process used keep no gradient."""
        if self.group.size == 1:
            return
        parameters = self.state.parameters
        for p in parameters:  # FSDP2 has averaged over the processes already
            if is_sharded(p) and p.grad is not None:
                p.grad.mul_(self.group.size)
        parameters = [p for p in parameters if not is_sharded(p)]
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=self.state.device)
        self.group.sum_([used, total])
        theirs = [p for p, count in zip(parameters, used.tolist(), strict=True) if count]
        for p in theirs:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.group.sum_([cast(Tensor, p.grad) for p in theirs])

    def _loss(self, part: int, rows: Tensor) -> Tensor:
        """Mean loss over the rows of a part. Every part has noise of its own."""
        own, others = derive_seeds(self.settings.seed, self.state.step, *((part, _PART) if part else ()), count=2)
        generator = torch.Generator(self.state.device).manual_seed(own)
        seed_networks(others, self.state.device)  # for dropout and other noise inside the networks
        x, given = self.data.batch(rows, generator)
        cond = self._dropped(given, len(x), generator)
        with networks_in(PRECISIONS[self.settings.precision]):
            values = self.state.minimised(self.state.model, x, generator=generator, **cond)
        if self.weights is None:
            return values.mean()
        if values.shape != (len(rows),):
            raise ValueError(f"objective returned shape {tuple(values.shape)}, sample_weight needs ({len(rows)},).")
        return (values * self.weights[rows].to(values)).mean()

    def _dropped(self, cond: Mapping[str, Any], rows: int, generator: torch.Generator) -> Mapping[str, Any]:
        """Put null values into random rows of the conditioning, the same rows for every name."""
        if self.settings.cond_dropout == 0.0:
            return cond
        drop = torch.rand(rows, generator=generator, device=generator.device) < self.settings.cond_dropout
        null = {
            name: nulled(name, cond[name], value)
            for name, value in null_of(self.state.model.predictor).items()
            if name in cond
        }
        return {**cond} | {
            name: torch.where(drop.to(value.device).reshape(-1, *(1,) * (value.ndim - 1)), value, cond[name])
            for name, value in null.items()
        }

    def _rows(self) -> Tensor:
        """Rows of this step's batch: of a permutation of the data, or the next ones of a stream."""
        size = min(self.settings.batch_size, self.data.rows)
        if self.data.is_stream:
            return torch.arange(self.state.step * size, (self.state.step + 1) * size)
        epoch, index = divmod(self.state.step, self.data.rows // size)
        if self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seeds(self.settings.seed, epoch, _EPOCH)[0])
            self._permutation = (epoch, torch.randperm(self.data.rows, generator=generator))
        return self._permutation[1][index * size : (index + 1) * size]


def validate_weights(weights: Any, source: Source) -> Tensor | None:
    """Weights of rows as a tensor with mean 1.

    Args:
        weights: what the user passed as ``sample_weight``.
        source: the rows.

    Raises:
        ValueError: there is not one weight for each row, or a weight is negative or not finite, or all are 0.
    """
    if weights is None:
        return None
    if source.is_stream:
        raise ValueError("sample_weight has one weight per row, and data are a stream of unknown length.")
    found = torch.as_tensor(weights).detach().cpu().double()
    if found.shape != (source.rows,):
        raise ValueError(f"sample_weight has shape {tuple(found.shape)}, expected ({source.rows},), one for each row.")
    if not bool(found.isfinite().all() and (found >= 0.0).all() and found.sum() > 0.0):
        raise ValueError("sample_weight must be finite and at least 0, and not all 0.")
    return found / found.mean()


def clip_gradients(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients down to a norm of at most ``most``; returns the norm before.

    Sharded gradients and others are scaled together, by the norm of all of them.
    """
    kinds = [[p for p in parameters if is_sharded(p) is sharded and p.grad is not None] for sharded in (False, True)]
    if not kinds[1]:
        return torch.nn.utils.clip_grad_norm_(parameters, most)
    norms = [whole(torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in kind])) for kind in kinds if kind]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = min(1.0, most / (float(norm) + 1e-6))
    for p in (*kinds[0], *kinds[1]):
        cast(Tensor, p.grad).mul_(scale)
    return norm


def _like(mean: Tensor, tensor: Tensor) -> Tensor:
    """A mean in the dtype of the tensors it was computed from."""
    return (mean if tensor.is_floating_point() else mean.round()).to(tensor.dtype)
