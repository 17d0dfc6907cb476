r"""log p(x) of one model as other packages compute it: the same network, the same velocity, another protocol.

.. math::
    \log p_{t_{min}}(x) = \log p_1(z_1) + \int_{t_{min}}^1 \operatorname{div} v(z_t, t)\, dt, \qquad
    \dot z = v(z, t),\ z_{t_{min}} = x .

Every peer integrates the model's own v from x at ``t_min`` to 1, in the dtype of x, and adds the model's own prior.
Trace, solver, error norm and state are the peer's, in the form its documentation or its only code shows:

===================  ==================================================================================================
score_sde            scipy RK45 on one flat float64 state of the whole batch, log p appended; one Rademacher probe,
                     frozen; the network runs twice per evaluation, once for the drift and once for the divergence
flow_matching        ``ODESolver.compute_likelihood``, dopri5 of torchdiffeq; one Rademacher probe
flow_matching_exact  the same with ``exact_divergence=True``: a loop over dimensions; flat events ``(B, D)`` only
zuko                 ``FreeFormJacobianTransform(exact=False)``, its own Dormand-Prince steps under the largest error
                     of the batch, the trace in units of 1/100; one Gaussian probe
zuko_exact           the same with ``exact=True``: one batched backward pass for all dimensions
torchdyn             ``torchdyn.models.CNF(hutch_trace)`` in a ``NeuralODE``, dopri5; one Gaussian probe. It stands for
                     torchcfm too, which has no likelihood of its own and plots densities with this pair
torchdyn_exact       the same with ``autograd_trace``: a loop over dimensions
torchdiffeq_exact    the common denominator for a table: dopri5 of torchdiffeq on (z, log p), the trace by a loop of
                     ``torch.autograd.grad`` over the dimensions
===================  ==================================================================================================

None of them returns a standard error. ``tol`` is rtol and atol. Random numbers come from torch's global generator,
which is seeded from ``generator`` for the call and restored afterwards. Not taken over from a peer: its default
tolerance or step, a network that sees float32 time, and score_sde's offset to bits per dimension.

References:
    https://github.com/yang-song/score_sde_pytorch (its likelihood module, written anew here)
    https://github.com/facebookresearch/flow_matching, https://github.com/probabilists/zuko,
    https://github.com/DiffEqML/torchdyn, https://github.com/rtqichen/torchdiffeq
"""

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torchdiffeq
from torch import Tensor, nn

import ndm_ct

INSTALL = {
    "scipy": "scipy",
    "flow_matching": "flow_matching",
    "zuko": "zuko",
    "torchdyn": "torchdyn (or, without its notebooks' packages: pip install --no-deps torchdyn torchcde "
    "pytorch-lightning lightning-utilities torchmetrics attrs pyyaml fsspec packaging)",
}
"""What to install for a package; torchdyn pulls in Jupyter and torchvision, which a likelihood does not need."""


@dataclass(frozen=True)
class Result:
    """log p(x) in nats, float64, ``(B,)``, and the forward passes and vector-Jacobian products of the whole batch.

    A batched backward pass of D products counts as D.
    """

    logp: Tensor
    forward: int
    vjps: int


class Field:
    """The model's velocity in the dtype of x, counted: one network pass per call, one product per backward pass."""

    def __init__(self, model: ndm_ct.NDM, dtype: torch.dtype) -> None:
        self.model, self.flow = model, model.flow(dtype)
        self.forward = self.vjps = 0
        self.products = 1

    def __call__(self, t: float | Tensor, z: Tensor) -> Tensor:
        """v(z, t), for a number t and z ``(B, *E)``."""
        self.forward += 1
        velocity = self.flow(torch.as_tensor(t, dtype=torch.float64, device=z.device), z)
        if velocity.requires_grad:
            # The gradient arrives here once per backward pass, whoever asked for it.
            velocity.register_hook(self._count)
        return velocity

    def flat(self, t: float | Tensor, z: Tensor) -> Tensor:
        """v for flattened states ``(B, D)``."""
        return self(t, z.unflatten(1, self.model.event_shape)).flatten(1)

    def _count(self, gradient: Tensor) -> None:
        self.vjps += self.products


@dataclass(frozen=True)
class Peer:
    """One way to compute log p(x): ``protocol`` takes the counted velocity, x and the tolerance.

    The trace is ``exact``, or estimated by one frozen probe per row.

    Example:
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x = torch.ones(3, 2, dtype=torch.float64)
        >>> result = PEERS["torchdiffeq_exact"](model, x, 1e-6)
        >>> torch.allclose(result.logp, model.log_prob(x), atol=1e-3), result.vjps == 2 * result.forward
        (True, True)
    """

    name: str
    exact: bool
    protocol: Callable[[Field, Tensor, float], Tensor]

    def __call__(
        self, model: ndm_ct.NDM, x: Tensor, tol: float = 1e-5, generator: torch.Generator | None = None
    ) -> Result:
        """log p(x) at tolerance ``tol``, probes drawn from ``generator`` (None: torch's global one).

        Raises:
            ImportError: the package is not installed; names the command that installs it.
            ValueError: data the model or the peer cannot take.
        """
        model.validate(x, {}, ndm_ct.loglik)
        field = Field(model, x.dtype)
        with model.evaluating(), torch.no_grad(), _seeded(generator):
            logp = self.protocol(field, x, tol)
        return Result(logp.detach().double(), field.forward, field.vjps)


def score_sde(field: Field, x: Tensor, tol: float) -> Tensor:
    """scipy's RK45 on one flat float64 vector: the batch's states, then its log-determinants."""
    integrate = _package("scipy.integrate")
    rows, probe = len(x), torch.randint_like(x, 0, 2) * 2 - 1

    def to_tensor(y: np.ndarray) -> Tensor:
        return torch.as_tensor(y[:-rows], device=x.device).reshape(x.shape).to(x.dtype)

    def derivative(t: float, y: np.ndarray) -> np.ndarray:
        z = to_tensor(y)
        drift = field(t, z)
        with torch.enable_grad():
            z.requires_grad_()
            (product,) = torch.autograd.grad((field(t, z) * probe).sum(), z)
        return np.concatenate([_numpy(drift), _numpy((product * probe).flatten(1).sum(1))])

    start = np.concatenate([_numpy(x), np.zeros(rows)])
    solution = integrate.solve_ivp(derivative, (field.model.t_min, 1.0), start, rtol=tol, atol=tol, method="RK45")
    if not solution.success:
        raise RuntimeError(f"scipy's RK45 gave up at tol={tol:g} ({solution.message}); use a larger tol.")
    end = solution.y[:, -1]
    return field.model.log_prior(to_tensor(end)) + torch.as_tensor(end[-rows:], device=x.device)


def flow_matching(field: Field, x: Tensor, tol: float, exact: bool = False) -> Tensor:
    r"""``ODESolver.compute_likelihood``. Its time s runs from noise at 0 to data at 1, so

    .. math:: t = t_{min} + (1 - s)(1 - t_{min}), \qquad u(x, s) = -(1 - t_{min})\, v(x, t) .
    """
    solver = _package("flow_matching.solver")
    if exact and x.ndim != 2:
        raise ValueError(
            f"compute_likelihood(exact_divergence=True) indexes columns of flat events (B, D), got x of shape "
            f"{tuple(x.shape)}; use the peer 'flow_matching'."
        )
    t_min = field.model.t_min

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -(1.0 - t_min) * field(t_min + (1.0 - t.double()) * (1.0 - t_min), x)

    with _default_dtype(x.dtype):  # its probe and log-determinants have the default dtype
        _, logp = solver.ODESolver(velocity).compute_likelihood(
            x, field.model.log_prior, step_size=None, method="dopri5", atol=tol, rtol=tol, exact_divergence=exact
        )
    return logp


def zuko(field: Field, x: Tensor, tol: float, exact: bool = False) -> Tensor:
    """``FreeFormJacobianTransform`` from t_min to 1 on flattened events."""
    transforms = _package("zuko.transforms")
    field.products = x[0].numel() if exact else 1  # the exact trace is one batched backward pass
    transform = transforms.FreeFormJacobianTransform(
        field.flat, field.model.t_min, 1.0, atol=tol, rtol=tol, exact=exact
    )
    z, logdet = transform.call_and_ladj(x.flatten(1))
    return field.model.log_prior(z.reshape(x.shape)) + logdet


def torchdyn(field: Field, x: Tensor, tol: float, exact: bool = False) -> Tensor:
    r"""``NeuralODE(CNF(net))``: the state is :math:`(-\int \operatorname{div} v\,dt,\ z)`, one flat row per event."""
    core, models = _package("torchdyn.core"), _package("torchdyn.models.cnf")
    flat = x.flatten(1)
    probes = None
    if not exact:
        zeros = torch.zeros_like(flat[0])
        probes = torch.distributions.MultivariateNormal(zeros, torch.eye(len(zeros)).to(zeros))
    block = models.CNF(_TimedNet(field), models.autograd_trace if exact else models.hutch_trace, noise_dist=probes)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how it wraps the field
        ode = core.NeuralODE(block, solver="dopri5", atol=tol, rtol=tol).to(x.device)
        end = ode.trajectory(
            torch.cat([torch.zeros_like(flat[:, :1]), flat], 1), torch.tensor([field.model.t_min, 1.0]).to(x)
        )[-1]
    return field.model.log_prior(end[:, 1:].reshape(x.shape)) - end[:, 0]


class _TimedNet(nn.Module):
    """The field of flat states; torchdyn writes the time into every module that has an attribute ``t``."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field, self.t = field, 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.field.flat(self.t, x)


def torchdiffeq_exact(field: Field, x: Tensor, tol: float) -> Tensor:
    """dopri5 on (z, log-determinant); d backward passes per evaluation, one after the other."""

    def derivative(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            velocity = field.flat(t, z)
            columns = range(z.shape[1])
            rows = (torch.autograd.grad(velocity[:, i].sum(), z, retain_graph=True)[0][:, i] for i in columns)
            divergence = torch.stack(list(rows)).sum(0)
        return velocity.detach(), divergence

    flat = x.flatten(1)
    z, logdet = torchdiffeq.odeint(
        derivative, (flat, torch.zeros_like(flat[:, 0])), torch.tensor([field.model.t_min, 1.0]).to(x),
        method="dopri5", rtol=tol, atol=tol,
    )  # fmt: skip
    return field.model.log_prior(z[-1].reshape(x.shape)) + logdet[-1]


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy().reshape(-1)


def _package(module: str) -> Any:
    """A module of a package that only its own peers need."""
    package = module.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this peer needs {module} ({error}); pip install {INSTALL[package]}.") from error


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """The global generator seeded from ``generator``, and put back afterwards."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("score_sde", False, score_sde),
        Peer("flow_matching", False, flow_matching),
        Peer("flow_matching_exact", True, partial(flow_matching, exact=True)),
        Peer("zuko", False, zuko),
        Peer("zuko_exact", True, partial(zuko, exact=True)),
        Peer("torchdyn", False, torchdyn),
        Peer("torchdyn_exact", True, partial(torchdyn, exact=True)),
        Peer("torchdiffeq_exact", True, torchdiffeq_exact),
    )
}
"""Every peer by name."""
