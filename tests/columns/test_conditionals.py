"""All conditionals of one model: against Gaussians whose conditionals are known, by an exact predictor."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from ndm_ct.columns import OBSERVED, TARGET, UNKNOWN, Coding, Column, Table, draw_noise
from ndm_ct.model import NDM
from ndm_ct.schedules import LinearLogSNR

D = 4
FACTOR = np.tril(np.random.default_rng(3).normal(size=(D, D))) + 1.5 * np.eye(D)
COVARIANCE = FACTOR @ FACTOR.T
GAMMA = -16.0


class Exact(nn.Module):
    """The denoiser of the targets given the observed of N(0, C), in the place of a trained network."""

    wants_schedule = True

    def __init__(self):
        super().__init__()
        self.precision = nn.Parameter(torch.zeros((), dtype=torch.float64))  # so that the model has one

    def forward(self, z, t, schedule, /, roles, known):
        C, c = torch.from_numpy(COVARIANCE), schedule(t.double())
        rows = []
        for k in range(len(z)):
            target, seen = roles[k] == TARGET, roles[k] == OBSERVED
            gain = C[target][:, seen] @ torch.linalg.inv(C[seen][:, seen])
            mean = gain @ known[k][seen]
            inner = C[target][:, target] - gain @ C[seen][:, target]
            a, s = c.alpha[k], c.sigma[k]
            noisy = a**2 * inner + s**2 * torch.eye(int(target.sum()), dtype=torch.float64)
            found = a * z[k]  # the exact denoiser of N(0, 1)
            found = found.masked_scatter(target, mean + a * inner @ torch.linalg.solve(noisy, z[k][target] - a * mean))
            rows.append(found)
        return torch.stack(rows)


@pytest.fixture(scope="module")
def exact():
    table = Table(Coding([Column(f"x{k}", "continuous") for k in range(D)]), conditionals=True)
    return table, NDM(Exact(), (D,), schedule=LinearLogSNR(GAMMA, 40.0), checks=False).double()


def conditional(x, target, seen):
    """Exact log p(x_T | x_O), of data with the noise at t = 0 on the targets (alpha is 1 to 1e-7)."""
    c = COVARIANCE
    gain = c[np.ix_(target, seen)] @ np.linalg.inv(c[np.ix_(seen, seen)])
    inner = c[np.ix_(target, target)] - gain @ c[np.ix_(seen, target)]
    alpha2 = 1.0 / (1.0 + np.exp(GAMMA))
    noisy = alpha2 * inner + (1.0 - alpha2) * np.eye(len(target))
    return stats.multivariate_normal(np.zeros(len(target)), noisy).logpdf(x[target] - alpha2**0.5 * gain @ x[seen])


CASES = [((0, 1, 2, 3), ()), ((1,), (0, 2, 3)), ((0, 3), (1,)), ((2, 3), ()), ((0,), (3,)), ((1, 2, 3), (0,))]


@pytest.mark.parametrize(("target", "seen"), CASES)
def test_every_conditional_is_the_exact_one(exact, target, seen):
    """Targets, observed and unknown columns in one event: velocity, trace and constants are those of the targets."""
    table, model = exact
    rows = np.random.default_rng(0).normal(size=(2, D)) @ FACTOR.T
    roles = np.full((2, D), UNKNOWN)
    roles[:, target], roles[:, seen] = TARGET, OBSERVED
    hidden = np.where(roles == UNKNOWN, np.nan, rows)
    found, errors, _ = table.score(model, hidden, None, roles=roles, method="ode", rtol=1e-7, atol=1e-7)
    expected = [conditional(row, list(target), list(seen)) for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(errors, 0.0)
    np.testing.assert_allclose(table.score(model, hidden, None, roles=roles)[0], expected, atol=5e-3)


def test_values_are_drawn_from_the_conditional(exact):
    table, model = exact
    n, given = 400, np.tile([np.nan, 1.0, -2.0, np.nan], (400, 1))
    roles = np.where(np.isnan(given), TARGET, OBSERVED)
    drawn = table.draw(model, n, (torch.Generator(), 0), numbers=given, roles=roles, method="unipc", steps=30)
    np.testing.assert_array_equal(drawn[:, [1, 2]], given[:, [1, 2]])
    c, (t, s) = COVARIANCE, ([0, 3], [1, 2])
    gain = c[np.ix_(t, s)] @ np.linalg.inv(c[np.ix_(s, s)])
    inner = c[np.ix_(t, t)] - gain @ c[np.ix_(s, t)]
    error = np.sqrt(np.diag(inner) / n)
    assert (abs(drawn[:, t].mean(0) - gain @ given[0, s]) < 5.0 * error + 0.02).all()
    np.testing.assert_allclose(np.cov(drawn[:, t].T), inner, rtol=0.2, atol=0.2 * inner.max())


def test_training_rows_have_roles_of_all_kinds():
    """Missing values are unknown, every row has a target, what is hidden does not reach the network."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=(500, 3))
    numbers[random.random((500, 3)) < 0.2] = np.nan
    numbers[:, 0] = np.nan_to_num(numbers[:, 0])
    table = Table.of([Column(name, "continuous") for name in "abc"], numbers, conditionals=True, random=random)
    x, cond, places = table.training_rows(numbers, random, copies=4)
    roles, missing = cond["roles"].numpy(), np.isnan(numbers[places])
    assert (roles[missing] == UNKNOWN).all()
    assert (roles == TARGET).any(1).all()
    assert {tuple(sorted(set(row))) for row in roles.tolist()} >= {(0, 1, 2), (1, 2), (0, 2), (2,)}
    whole = (roles == TARGET).sum(1) == (~missing).sum(1)
    assert 0.3 < whole.mean() < 0.75
    assert (x.numpy()[roles != TARGET] == 0.0).all()
    assert (cond["known"].numpy()[roles != OBSERVED] == 0.0).all()
    z = np.nan_to_num((numbers[places] - table.coding.mean) / table.coding.scale)
    mapped = table.column_map.scores(torch.from_numpy(z).T.contiguous())[0].T.numpy()
    np.testing.assert_allclose(cond["known"].numpy()[roles == OBSERVED], mapped[roles == OBSERVED], atol=1e-5)


def test_noise_comes_in_strata():
    noise = draw_noise([torch.Generator().manual_seed(k) for k in range(3)], 8, 2)
    assert noise.shape == (3, 8, 2)
    np.testing.assert_array_equal((8 * noise).floor().sort(1).values, torch.arange(8.0)[:, None].expand(3, 8, 2))
    assert draw_noise([torch.Generator()], 8, 0) is None
