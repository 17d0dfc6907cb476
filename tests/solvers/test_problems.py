"""Published problems: the solvers against scipy's DOP853 at 1e-12, and an SDE against its moments.

The 25 problems are those of Hull, Enright, Fellen and Sedgwick, Comparing Numerical Methods for Ordinary Differential
Equations (1972), https://doi.org/10.1137/0709052, classes A (one equation), B (small systems), C (moderate systems),
D (orbits of growing eccentricity) and E (equations of higher order), all from 0 to 20.
"""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from ndm_ct.solvers import sdeint
from ndm_ct.solvers.ode import odeint_rows
from ndm_ct.solvers.torchdiffeq import odeint

END = 20.0


def columns(y):
    return y.unbind(-1)


def stack(*parts):
    return torch.stack(torch.broadcast_tensors(*parts), -1)


def lotka(t, y):
    a, b = columns(y)
    return stack(2.0 * (a - a * b), a * b - b)


def reaction(t, y):
    a, b, c = columns(y)
    return stack(b - a, a - 2.0 * b + c, b - c)


def quadratic_reaction(t, y):
    a, b, _ = columns(y)
    return stack(-a, a - b**2, b**2)


def torus(t, y):
    a, b, c = columns(y)
    r = torch.sqrt(a**2 + b**2)
    return stack(-b - a * c / r, a - b * c / r, a / r)


def rigid_body(t, y):
    a, b, c = columns(y)
    return stack(b * c, -a * c, -0.51 * a * b)


def decay_chain(rate):
    """y_i' = r_{i-1} y_{i-1} - r_i y_i, where the last one only fills."""

    def field(t, y):
        flow = y[..., :-1] * rate(torch.arange(1.0, y.shape[-1], dtype=y.dtype))
        into = torch.cat([torch.zeros_like(flow[..., :1]), flow], -1)
        return into - torch.cat([flow, torch.zeros_like(flow[..., :1])], -1)

    return field


def heat(t, y):
    edge = torch.zeros_like(y[..., :1])
    return torch.cat([edge, y[..., :-1]], -1) - 2.0 * y + torch.cat([y[..., 1:], edge], -1)


SUN, GRAVITY = 1.00000597682, 2.95912208286
MASSES = torch.tensor(
    [0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778]
).double()
PLACES = [
    [3.42947415189, 3.35386959711, 1.35494901715], [6.64145542550, 5.97156957878, 2.18231499728],
    [11.2630437207, 14.6952576794, 6.27960525067], [-30.1552268759, 1.65699966404, 1.43785752721],
    [-21.1238353380, 28.4465098142, 15.3882659679],
]  # fmt: skip
SPEEDS = [
    [-0.557160570446, 0.505696783289, 0.230578543901], [-0.415570776342, 0.365682722812, 0.169143213293],
    [-0.325325669158, 0.189706021964, 0.0877265322780], [-0.0240476254170, -0.287659532608, -0.117219543175],
    [-0.176860753121, -0.216393453025, -0.0148647893090],
]  # fmt: skip


def planets(t, y):
    """The five outer planets around the sun."""
    q, v = (part.unflatten(-1, (5, 3)) for part in y.chunk(2, -1))
    pull = q / q.norm(dim=-1, keepdim=True) ** 3
    apart = q.unsqueeze(-3) - q.unsqueeze(-2)  # [i, j] = q_j - q_i
    distance = apart.norm(dim=-1, keepdim=True) + torch.eye(5, dtype=y.dtype)[..., None]
    others = (MASSES[:, None] * (apart / distance**3 - pull.unsqueeze(-3))).sum(-2)
    own = -(SUN + MASSES[:, None]) * pull + MASSES[:, None] * pull  # the sum over j leaves out j = i
    return torch.cat([v.flatten(-2), (GRAVITY * (own + others)).flatten(-2)], -1)


def orbit(t, y):
    a, b, u, v = columns(y)
    r = (a**2 + b**2) ** 1.5
    return stack(u, v, -a / r, -b / r)


def bessel(t, y):
    a, b = columns(y)
    return stack(b, -b / (t + 1.0) - (1.0 - 0.25 / (t + 1.0) ** 2) * a)


def duffing(t, y):
    a, b = columns(y)
    return stack(b, a**3 / 6.0 - a + 2.0 * torch.sin(2.78535 * t))


def pursuit(t, y):
    return stack(y[..., 1], torch.sqrt(1.0 + y[..., 1] ** 2) / (25.0 - t))


# Errors of phase add up along orbits, the more the closer the approach; the planets' states are large.
GROWTH = {"B1": 2e4, "C5": 1e3, "D1": 6e3, "D2": 6e3, "D3": 6e3, "D4": 2e4, "D5": 2e4, "E3": 2e4}


def unit(n):
    return [1.0] + [0.0] * (n - 1)


PROBLEMS = {
    "A1": (lambda t, y: -y, [1.0]),
    "A2": (lambda t, y: -0.5 * y**3, [1.0]),
    "A3": (lambda t, y: y * torch.cos(t)[..., None], [1.0]),
    "A4": (lambda t, y: 0.25 * y * (1.0 - y / 20.0), [1.0]),
    "A5": (lambda t, y: (y - t[..., None]) / (y + t[..., None]), [4.0]),
    "B1": (lotka, [1.0, 3.0]),
    "B2": (reaction, [2.0, 0.0, 1.0]),
    "B3": (quadratic_reaction, [1.0, 0.0, 0.0]),
    "B4": (torus, [3.0, 0.0, 0.0]),
    "B5": (rigid_body, [0.0, 1.0, 1.0]),
    "C1": (decay_chain(torch.ones_like), unit(10)),
    "C2": (decay_chain(lambda i: i), unit(10)),
    "C3": (heat, unit(10)),
    "C4": (heat, unit(51)),
    "C5": (planets, np.concatenate([np.ravel(PLACES), np.ravel(SPEEDS)]).tolist()),
    **{
        f"D{k}": (orbit, [1.0 - e, 0.0, 0.0, math.sqrt((1.0 + e) / (1.0 - e))])
        for k, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), 1)
    },
    "E1": (bessel, [0.6713967071418030, 0.09540051444747446]),
    "E2": (lambda t, y: stack(y[..., 1], (1.0 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]), [2.0, 0.0]),
    "E3": (duffing, [0.0, 0.0]),
    "E4": (lambda t, y: stack(y[..., 1], 0.032 - 0.4 * y[..., 1] ** 2), [30.0, 0.0]),
    "E5": (pursuit, [0.0, 0.0]),
}

CLOSED = {
    "A1": math.exp(-END),
    "A2": 1.0 / math.sqrt(1.0 + END),
    "A3": math.exp(math.sin(END)),
    "A4": 20.0 / (1.0 + 19.0 * math.exp(-END / 4.0)),
    "E1": math.sqrt(2.0 / (math.pi * (END + 1.0))) * math.sin(END + 1.0),
    "E5": None,
}


def by_scipy(field, y0):
    def numpy_field(t, y):
        return field(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y)).numpy()

    return torch.from_numpy(solve_ivp(numpy_field, (0.0, END), y0, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1])


def by_rows(field, y0, tol):
    """Two rows, the second of which starts elsewhere."""
    y = torch.tensor([y0, y0], dtype=torch.float64)
    y[1, 0] += 0.01
    return odeint_rows(lambda t, s, rows: ((field(t, s[0]),), None), (y,), 0.0, END, rtol=tol, atol=tol).state[0][0]


def by_batch(field, y0, tol):
    y = torch.tensor([y0], dtype=torch.float64)
    return odeint(lambda t, s: (field(t.expand(1), s[0]),), (y,), 0.0, END, rtol=tol, atol=tol).state[0][0]


@pytest.mark.parametrize("solve", [by_rows, by_batch])
@pytest.mark.parametrize("name", PROBLEMS)
def test_errors_follow_the_tolerance(name, solve):
    """The error at the end is the tolerance up to the growth of errors along the way, which is that of the problem."""
    field, y0 = PROBLEMS[name]
    exact = by_scipy(field, y0)
    loose, tight = (float((solve(field, y0, tol) - exact).abs().max()) for tol in (1e-5, 1e-8))
    growth = GROWTH.get(name, 100.0)
    assert tight < growth * 1e-8
    assert loose < growth * 1e-5
    assert tight < 0.05 * loose or tight < 1e-8


@pytest.mark.parametrize("name", [name for name, value in CLOSED.items() if value is not None])
def test_the_reference_is_the_closed_form(name):
    assert float(by_scipy(*PROBLEMS[name])[0]) == pytest.approx(CLOSED[name], abs=1e-9)


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "srk"])
def test_an_additive_sde_has_its_mean_and_variance(method):
    r"""dy = (b/sqrt(1+t) - y/(2(1+t))) dt + a b/sqrt(1+t) dW, whose solution is (y_0 + b t + a b W_t)/sqrt(1+t)."""
    a, b, start, rows, end = 0.7, 0.4, 1.3, 20_000, 1.0
    y = sdeint(
        lambda t, y: b / torch.sqrt(1.0 + t) - y / (2.0 * (1.0 + t)),
        lambda t, y: (a * b / torch.sqrt(1.0 + t)).expand(1, 1),
        torch.full((rows, 1), start, dtype=torch.float64),
        torch.linspace(0.0, end, 101, dtype=torch.float64),
        method=method, generator=0,
    ).state[0]  # fmt: skip
    mean, variance = (start + b * end) / math.sqrt(1.0 + end), (a * b) ** 2 * end / (1.0 + end)
    assert abs(float(y.mean()) - mean) < 4.0 * math.sqrt(variance / rows) + (2e-3 if method == "euler" else 1e-4)
    assert float(y.var()) == pytest.approx(variance, rel=4.0 * math.sqrt(2.0 / rows) + 0.01)
