"""Properties: whatever tensor comes, the result is right, or the error is a documented one that names what came.

Tensors are drawn by hypothesis: floating dtypes, no row or several, values from 1e-45 to 1e300, NaN and infinities at
random places, and memory that is strided, transposed, expanded or offset. Every property has an oracle: an exact
density, an inverse, the row alone, the contiguous copy, another batch size, the same seed. A few dozen cases run each
time, always the same; ``-m slow`` draws thousands.
"""

import functools
import math
from dataclasses import dataclass

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from oracles import ALL_SCHEDULES

import ndm_ct
from ndm_ct import NDM, adapters, nn, reference, schedules, transforms
from ndm_ct.quantisation import Quantisation

DOCUMENTED = (ValueError, TypeError, ndm_ct.SolverError, ndm_ct.PredictorError)
SHORT = schedules.LinearLogSNR(-6.0, 5.0)
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


# ------------------------------------------------------------------------------------------------------------- models


@functools.cache
def gaussian():
    return reference.Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([[1.0, 0.5], [0.5, 2.0]]), schedule=SHORT)


@functools.cache
def mixture():
    covs = torch.tensor([[[0.5, 0.1], [0.1, 0.3]], [[0.2, 0.0], [0.0, 0.6]]])
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    return reference.GaussianMixture(torch.tensor([0.3, 0.7]), means, covs, schedule=SHORT)


@functools.cache
def network(dtype):
    """A network that is no zero function, with a transform that moves."""
    torch.manual_seed(0)
    parts = nn.MLP(2, width=8, depth=1), nn.MLP(2, width=8, depth=1, outputs=2, time=False)
    model = NDM(nn.Preconditioned(parts[0]), (2,), transform=transforms.Separable(parts[1]), schedule=SHORT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.to(dtype)


# ------------------------------------------------------------------------------------------------------------ tensors


@dataclass(frozen=True)
class Case:
    """A tensor as it is passed, and the same values in plain memory."""

    x: torch.Tensor

    @property
    def plain(self):
        return self.x.detach().clone(memory_format=torch.contiguous_format)


LAYOUTS = ("plain", "strided", "transposed", "expanded", "offset", "flipped axes", "grad")


def laid_out(x, layout):
    """The values of x ``(n, d)`` in another kind of memory (expanded: those of its first row)."""
    if layout == "strided":
        wide = torch.full((2 * x.shape[0], 3 * x.shape[1]), math.nan, dtype=x.dtype)
        wide[::2, ::3] = x
        return wide[::2, ::3]
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "expanded" and len(x):
        return x[:1].expand(x.shape)
    if layout == "offset":
        return torch.cat([torch.full_like(x, math.nan), x])[len(x) :]
    if layout == "flipped axes":
        return x[..., None].permute(2, 1, 0).contiguous().permute(2, 1, 0)[..., 0]
    return x.requires_grad_() if layout == "grad" else x


@st.composite
def batches(draw, dtypes=(torch.float32, torch.float64), sizes=(0, 1, 2, 5), exponents=(-45.0, 300.0)):
    """Rows of two: ordinary ones, and ones of every magnitude."""
    dtype, n = draw(st.sampled_from(dtypes)), draw(st.sampled_from(sizes))
    exponent = draw(st.one_of(st.just(0.0), st.floats(*exponents)))
    digits = draw(st.lists(st.floats(-3.0, 3.0, allow_subnormal=False), min_size=2 * n, max_size=2 * n))
    values = [digit * 10.0 ** max(-320.0, exponent) for digit in digits]
    limit = torch.finfo(dtype).max
    x = torch.tensor([min(max(value, -limit), limit) for value in values], dtype=dtype).reshape(n, 2)
    return Case(laid_out(x, draw(st.sampled_from(LAYOUTS))))


ordinary = functools.partial(batches, exponents=(-5.0, 0.3))


def attempt(call):
    """The result of a call, or the documented error it raised; any other passes through."""
    try:
        return call(), None
    except DOCUMENTED as error:
        return None, error


def magnitude(x):
    return float(x.detach().double().abs().max()) if x.numel() else 0.0


def close(found, exact, tolerance=2e-3):
    """Equal to a tolerance, relative where it is large; an infinity only where the exact one is beyond the dtype."""
    exact = exact.to(found.dtype)
    assert found.shape == exact.shape
    assert not bool(found.isnan().any()), found
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------------- properties

PROPERTIES = {}


def holds(quick, slow, **drawn):
    """Registers a property with the number of its cases in the quick and in the slow run."""

    def register(body):
        PROPERTIES[body.__name__] = (body, drawn, quick, slow)
        return body

    return register


@holds(8, 250, case=batches(), model=st.sampled_from([gaussian, mixture]))
@hypothesis.example(case=Case(torch.full((2, 2), 1e30)), model=gaussian)  # -inf in float32, and rightly
@hypothesis.example(case=Case(torch.full((2, 2), 1e300, dtype=torch.float64)), model=gaussian)
def log_likelihoods_are_exact(case, model):
    found, error = attempt(lambda: ndm_ct.loglik(model(), case.x))
    if error is not None:
        assert magnitude(case.x) > 1e3, error
        return
    assert found.dtype == case.x.dtype
    assert not found.requires_grad
    if magnitude(case.x) < 1e6:
        close(found, model().log_prob(case.plain))
    else:
        # Rounding of a state this large is all that its solver sees; the density is that of the distance.
        far = case.plain.double().abs().amax(1) > 1e6
        assert bool((found[far] < -1e10).all())
        assert not bool(found.isnan().any())


@holds(6, 150, case=ordinary(sizes=(2, 5)), trace=st.sampled_from(["exact", "quadrature", "hutchinson"]))
def rows_do_not_know_their_batch_or_their_memory(case, trace):
    """Row i of a batch is the row alone; strided rows are their copy, bit by bit."""
    model = network(case.x.dtype)
    seeded = functools.partial(ndm_ct.loglik, model, trace=trace, rtol=1e-5, atol=1e-5)
    found = seeded(case.x, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, seeded(case.plain, generator=torch.Generator().manual_seed(3)), rtol=0, atol=1e-6)
    if trace == "exact":
        alone = torch.cat([seeded(row) for row in case.x.split(1)])
        close(found, alone, 1e-3)
    assert case.x.grad is None


@holds(6, 150, case=batches(exponents=(-45.0, 6.0)), exact=st.booleans())
def decoding_undoes_encoding(case, exact):
    model = gaussian() if exact else network(case.x.dtype)
    z, error = attempt(lambda: ndm_ct.encode(model, case.x, rtol=1e-6, atol=1e-7))
    if error is not None:
        assert magnitude(case.x) > 1e2, error
        return
    assert z.shape == case.x.shape
    back, error = attempt(lambda: ndm_ct.decode(model, z, rtol=1e-6, atol=1e-7))
    if error is None:
        close(back / max(1.0, magnitude(case.x)), case.plain / max(1.0, magnitude(case.x)), 5e-3)
    else:
        assert magnitude(case.x) > 1e2, error


@holds(8, 200, case=batches(), seed=st.integers(0, 2**40), samples=st.integers(1, 5))
@hypothesis.example(case=Case(torch.full((2, 2), 3e38)), seed=0, samples=2)
@hypothesis.example(case=Case(torch.zeros(0, 2)), seed=0, samples=2)
def bounds_are_sums_of_their_terms_and_reproduce(case, seed, samples):
    model = network(case.x.dtype)

    def bound(x):
        generator = torch.Generator().manual_seed(seed)
        return ndm_ct.elbo(model, x, samples=samples, generator=generator, return_info=True)

    with torch.no_grad():
        found, error = attempt(lambda: bound(case.x))
        if error is not None:
            assert magnitude(case.x) > 1e15, error
            return
        (value, info), (again, _) = found, bound(case.x)
        assert torch.equal(value, again)
        close(bound(case.plain)[0], value, 1e-3)  # products round by the layout of memory
        assert not bool(value.isnan().any())
        assert torch.equal(value, -(info.prior + info.diffusion + info.reconstruction))
        assert (info.stderr.isnan().all() if samples == 1 else True) or len(value) == 0
        loss = [
            ndm_ct.loss(model, x, generator=torch.Generator().manual_seed(seed)) for x in (case.x, case.x, case.plain)
        ]
        assert torch.equal(*loss[:2])
        close(*loss[1:], 1e-3)


@holds(4, 60, case=ordinary(sizes=(5,)), seed=st.integers(0, 2**40))
def bounds_do_not_exceed_the_density(case, seed):
    """The exact model's bound is that of its own density; 64 stratified samples are within a few standard errors."""
    generator = torch.Generator().manual_seed(seed)
    bound, info = ndm_ct.elbo(gaussian(), case.x, samples=64, generator=generator, return_info=True)
    slack = 6.0 * info.stderr + 0.05  # the decoder's kernel smooths the density a little
    assert bool((bound <= gaussian().log_prob(case.plain) + slack).all())


METHODS = st.sampled_from(["ode", "ddpm", "ddim", "heun", "dpmpp_2m", "unipc", "sde", "pndm", "deis3"])


@holds(
    8,
    200,
    method=METHODS,
    n=st.integers(0, 4),
    seed=st.integers(0, 2**40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    batch=st.sampled_from([None, 1, 2]),
)
def samples_follow_their_seeds(method, n, seed, dtype, batch):
    """The same seed, the same samples; with a seed for every sample, whatever batches they are drawn in."""
    model = network(dtype)
    options = {"method": method} | ({"rtol": 1e-4, "atol": 1e-4} if method == "ode" else {"steps": 4})

    def draw(batch_size=None):
        own = [torch.Generator().manual_seed(seed + k) for k in range(n)]
        return ndm_ct.sample(model, n, generator=own, batch_size=batch_size, **options)

    x = draw()
    assert x.shape == (n, 2)
    assert x.dtype == dtype
    assert bool(x.isfinite().all())
    assert torch.equal(x, draw())
    close(draw(batch), x, 1e-3)
    shared = [ndm_ct.sample(model, n, generator=torch.Generator().manual_seed(seed), **options) for _ in range(2)]
    assert torch.equal(*shared)
    if n > 1:
        assert not torch.equal(x[0], x[1])


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@holds(
    6,
    150,
    dtype=st.sampled_from(INTEGERS),
    layout=st.sampled_from(LAYOUTS[:-1]),
    values=st.lists(st.integers(-2, 9), max_size=6),
    levels=st.sampled_from([2, 8, 100]),
    seed=st.integers(0, 99),
)
@hypothesis.example(dtype=torch.uint16, layout="plain", values=[1, 9], levels=8, seed=0)
def bits_are_those_of_the_noised_levels(dtype, layout, values, levels, seed):
    level = torch.tensor(values[: len(values) // 2 * 2]).reshape(-1, 2).long()
    hypothesis.assume(dtype.is_signed or bool((level >= 0).all()))
    if dtype == torch.int64 and layout in ("transposed", "expanded", "flipped axes"):
        level = k = laid_out(level, layout)
    else:
        k = level.to(dtype)
    inside = bool(((level >= 0) & (level < levels)).all())
    generator = torch.Generator().manual_seed(seed)
    found, error = attempt(lambda: ndm_ct.bits_per_dim(gaussian(), k, quantisation=levels, generator=generator))
    if not inside:
        assert isinstance(error, ValueError)
        assert f"outside [0, {levels})" in str(error)
        return
    assert error is None, error
    bins = Quantisation(levels)
    points = bins.uniform(level, torch.get_default_dtype(), torch.Generator().manual_seed(seed))
    exact = gaussian().log_prob(points) + 2 * bins.uniform_offset
    close(found, -exact / (2 * math.log(2.0)))


@holds(
    6, 120, case=ordinary(sizes=(1, 5)), batch_size=st.integers(1, 7), seed=st.integers(0, 99), as_array=st.booleans()
)
def evaluations_are_means_of_exact_values(case, batch_size, seed, as_array):
    data = case.x.detach().numpy() if as_array else case.x
    result = ndm_ct.evaluate(mixture(), data, batch_size=batch_size, seed=seed, progress=False)
    exact = -mixture().log_prob(case.plain.double())[result.indices]
    assert sorted(result.indices.tolist()) == list(range(len(case.x)))
    torch.testing.assert_close(result.values, exact, rtol=2e-3, atol=2e-3)
    assert result.nll == pytest.approx(float(exact.mean()), abs=5e-3, rel=2e-3)
    assert (result.failed, result.reason) == (0, "data")


@holds(6, 60, case=ordinary(sizes=(1, 2, 5)), leading=st.sampled_from([(), (1,), (3,), (2, 1), (0,), (2, 0)]))
def distributions_broadcast(case, leading):
    p, rows = ndm_ct.distribution(gaussian()), case.x
    value = rows.expand(*leading, *rows.shape) if leading else rows
    found = p.log_prob(value)
    assert found.shape == (*leading, len(rows))
    close(found.detach(), gaussian().log_prob(case.plain).expand(*leading, len(rows)))
    close(p.log_prob(rows[0]).detach(), gaussian().log_prob(case.plain)[0])
    assert p.expand((3,)).log_prob(rows[0]).shape == (3,)


@holds(
    10,
    200,
    where=st.integers(0, 9),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    function=st.sampled_from(
        ["loglik", "encode", "decode", "elbo", "loss", "log_prob", "evaluate", "fit", "velocity", "score"]
    ),
    layout=st.sampled_from(LAYOUTS),
)
def what_is_not_finite_is_named(where, value, function, layout):
    x = torch.ones(5, 2)
    x[where // 2, where % 2] = value
    x = laid_out(x, layout if layout != "expanded" else "plain")
    model = network(torch.float32)
    calls = {
        "log_prob": lambda: ndm_ct.distribution(model).log_prob(x),
        "evaluate": lambda: ndm_ct.evaluate(model, x, progress=False),
        "fit": lambda: ndm_ct.fit(model, x, steps=1, progress=False),
        "velocity": lambda: model.velocity(x, 0.5),
        "score": lambda: model.score(x, 0.5),
    }
    with pytest.raises(ValueError, match=rf"NaN or inf in rows \[{where // 2}\]"):
        calls.get(function, lambda: getattr(ndm_ct, function)(model, x))()


WRONG = {
    **{str(dtype): lambda dtype=dtype: torch.ones(3, 2).to(dtype) for dtype in (torch.float16, torch.bfloat16)},
    **{str(dtype): lambda dtype=dtype: torch.ones(3, 2).to(dtype) for dtype in (torch.bool, torch.complex64)},
    **{f"float {dtype}": lambda dtype=dtype: torch.ones(3, 2).to(dtype) for dtype in INTEGERS},
    "scalar": lambda: torch.tensor(1.0),
    "integer scalar": lambda: torch.tensor(300),
    "no rows' axis": lambda: torch.ones(2),
    "no columns": lambda: torch.empty(3, 0),
    "empty": lambda: torch.empty(0),
    "too many axes": lambda: torch.ones(1, 3, 2),
    "too wide": lambda: torch.ones(3, 5),
    "sparse": lambda: torch.ones(3, 2).to_sparse(),
    "meta": lambda: torch.ones(3, 2, device="meta"),
    "list": lambda: [[1.0, 2.0]],
    "None": lambda: None,
    "word": lambda: "abc",
    "number": lambda: 3,
    "mapping": lambda: {"x": torch.ones(3, 2)},
}
FUNCTIONS = {
    "loglik": lambda model, x: ndm_ct.loglik(model, x),
    "encode": lambda model, x: ndm_ct.encode(model, x),
    "decode": lambda model, x: ndm_ct.decode(model, x),
    "elbo": lambda model, x: ndm_ct.elbo(model, x),
    "loss": lambda model, x: ndm_ct.loss(model, x),
    "evaluate": lambda model, x: ndm_ct.evaluate(model, x, progress=False),
    "fit": lambda model, x: ndm_ct.fit(network(torch.float32), x, steps=1, progress=False),
    "log_prob": lambda model, x: ndm_ct.distribution(model).log_prob(x),
    "velocity": lambda model, x: model.velocity(x, 0.5),
    "score": lambda model, x: model.score(x, 0.5),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_what_is_no_batch_of_data_is_refused(kind):
    """By every function, also with the exact model, which has no weights to compare dtype and device with."""
    for model in (gaussian(), network(torch.float32)):
        for name, function in FUNCTIONS.items():
            if name == "log_prob" and kind in ("too many axes", "no rows' axis"):  # a distribution takes any
                continue
            with pytest.raises((ValueError, TypeError), match=r"^(x|z|z1|data|value) (has|is|must)"):
                function(model, WRONG[kind]())


@pytest.mark.parametrize("bound", ["ode", "elbo"])
@pytest.mark.parametrize("kind", ["level", *sorted(set(WRONG) - {f"float {dtype}" for dtype in INTEGERS})])
def test_what_is_no_batch_of_levels_is_refused(kind, bound):
    x = torch.tensor(3) if kind == "level" else WRONG[kind]()
    with pytest.raises((ValueError, TypeError), match=r"^x (has|is|must)"):
        ndm_ct.bits_per_dim(gaussian(), x, quantisation=8, bound=bound)
    with pytest.raises((ValueError, TypeError), match=r"^data (has|is|must)"):
        ndm_ct.evaluate(gaussian(), x, quantisation=Quantisation(8), bound=bound, progress=False)


@holds(
    12,
    150,
    name=st.sampled_from(sorted(ALL_SCHEDULES)),
    times=st.lists(st.floats(1e-3, 1.0), max_size=5),
    layout=st.sampled_from(LAYOUTS[:3]),
)
def schedules_agree_with_their_derivatives(name, times, layout):
    schedule = ALL_SCHEDULES[name]()
    t = laid_out(torch.tensor(times, dtype=torch.float64)[:, None], layout)[:, 0]
    with torch.no_grad():
        c = schedule(t)
        assert c.alpha.shape == c.dsigma.shape == t.shape
        assert bool((c.wronskian > 0).all())
        h = 1e-6
        inner = t.clamp(2e-3, 1.0 - 2 * h)
        slope = (schedule(inner + h).angle - schedule(inner - h).angle) / (2 * h)
        torch.testing.assert_close(schedule(inner).dangle, slope, rtol=1e-4, atol=1e-6)
        angle = schedule(t).angle
        torch.testing.assert_close(schedule(schedule.time_at(angle)).angle, angle, rtol=1e-7, atol=1e-10)
        assert all(torch.equal(schedule(one).alpha, c.alpha[k]) for k, one in enumerate(t) if name != "Tabulated")


TRANSFORMS = {
    "identity": transforms.Identity,
    "separable": lambda: network(torch.float64).transform,
    "neural": lambda: transforms.Neural(network(torch.float64).predictor.net),
    "scaling": lambda: transforms.TimeScaling(lambda t: 1.0 + t**2),
}


@holds(
    8, 150, name=st.sampled_from(sorted(TRANSFORMS)), case=ordinary(dtypes=(torch.float64,)), t=st.floats(0.01, 0.99)
)
def transforms_begin_at_the_data_and_know_their_speed(name, case, t):
    transform, time = TRANSFORMS[name](), torch.tensor(t, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(transform(case.x, torch.zeros_like(time)), case.plain, rtol=0, atol=1e-12)
        F, dF = transform.with_derivative(case.x, time)
        torch.testing.assert_close(F, transform(case.plain, time), rtol=0, atol=1e-12)
        slope = (transform(case.x, time + 1e-5) - transform(case.x, time - 1e-5)) / 2e-5
        torch.testing.assert_close(dF, slope, rtol=1e-5, atol=1e-6)
        every = time.expand(len(case.x))
        torch.testing.assert_close(transform(case.x, every), F, rtol=0, atol=1e-12)


@holds(
    6,
    100,
    kind=st.sampled_from(["denoiser", "eps", "v", "velocity", "score"]),
    case=ordinary(),
    width=st.floats(0.3, 2.0),
)
def adapters_of_exact_networks_are_exact(kind, case, width):
    """The network that is right for N(0, s^2) in each convention; the model's density is that of z at t_min."""

    def gain(schedule, z, t):
        """E[x | z] = gain z."""
        c = schedule(t.double())
        return c, (c.alpha * width**2 / (c.alpha**2 * width**2 + c.sigma**2)).to(z.dtype)[:, None]

    def column(c, z):
        return c.to(z.dtype)[:, None]

    def denoiser(z, sigma):
        return z * (width**2 / (width**2 + sigma[:, None] ** 2))

    table = torch.linspace(0.999, 0.001, 50, dtype=torch.float64)
    tabulated = schedules.Tabulated(table)

    def noise(z, k):
        c, g = gain(tabulated, z, k / 49)
        return (z - column(c.alpha, z) * g * z) / column(c.sigma, z)

    def v(z, k):
        c, g = gain(tabulated, z, k / 49)
        return column(c.alpha, z) * noise(z, k) - column(c.sigma, z) * g * z

    def score(z, t):
        c, _ = gain(SHORT, z, t)
        return -z / column(c.alpha**2 * width**2 + c.sigma**2, z)

    def velocity(z, tau):
        c, g = gain(schedules.Rectified(), z, 1.0 - tau)
        return g * z - (z - column(c.alpha, z) * g * z) / column(c.sigma, z)

    model = {
        "denoiser": lambda: adapters.from_denoiser(denoiser, (2,), sigma_min=0.05, sigma_max=200.0),
        "eps": lambda: adapters.from_eps(noise, (2,), alphas_cumprod=table),
        "v": lambda: adapters.from_v(v, (2,), alphas_cumprod=table),
        "velocity": lambda: adapters.from_velocity(velocity, (2,), t_min=0.02),
        "score": lambda: adapters.from_score(score, (2,), schedule=SHORT),
    }[kind]()
    model.checks = False  # which name an x of another scale than N(0, s^2)
    z, info = ndm_ct.encode(model, case.x.detach(), return_info=True)
    start, end = (model.schedule(torch.tensor(t, dtype=torch.float64)) for t in (model.t_min, 1.0))
    spread = [float((c.alpha**2 * width**2 + c.sigma**2).sqrt()) for c in (start, end)]
    # The flow of a centred Gaussian is linear: it stretches by the ratio of its standard deviations.
    close(z, case.plain * spread[1] / spread[0], 5e-3)
    close(info.logdet, torch.full((len(case.x),), 2.0 * math.log(spread[1] / spread[0])), 5e-3)


@holds(
    8,
    100,
    levels=st.integers(2, 300),
    low=st.floats(-5.0, 5.0),
    width=st.floats(0.01, 10.0),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def levels_come_back_from_their_bins(levels, low, width, seed, dtype):
    bins = Quantisation(levels, edges=(low, low + width))
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(0, levels, (6, 2), generator=generator)
    if dtype == torch.float64:
        bins.validate_centres(bins.centres(k, dtype))
    noised = bins.uniform(k, dtype, generator).double()
    assert torch.equal(((noised - low) / (2 * bins.half_width) - 0.5).round().clamp(0, levels - 1).long(), k)
    truncated = bins.truncated_normal(k, 1.0, bins.half_width / 2, torch.float64, generator)
    assert bool(((truncated - bins.centres(k, torch.float64)).abs() <= bins.half_width * (1 + 1e-9)).all())
    assert bins.uniform_offset == pytest.approx(math.log(width / levels))


@functools.cache
def estimator():
    pytest.importorskip("sklearn", minversion="1.6")
    from ndm_ct.estimator import NDMDensity

    table = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 50.0]
    return NDMDensity(width=8, depth=1, steps=20, random_state=0).fit(table)


@holds(
    4,
    80,
    case=ordinary(sizes=(1, 2, 5)),
    kind=st.sampled_from(["rows", "list", "fortran", "half", "NaN", "wide", "none"]),
)
def tables_are_scored_row_by_row(case, kind):
    model, table = estimator(), case.plain.numpy()
    scores = model.score_samples(table)
    same = {"rows": lambda: table, "list": table.tolist, "fortran": lambda: np.asfortranarray(table)}
    if kind in same:
        assert np.allclose(model.score_samples(same[kind]()), scores, rtol=1e-6, atol=1e-6)
        alone = np.concatenate([model.score_samples(row[None]) for row in table])
        assert np.allclose(alone, scores, rtol=1e-6, atol=1e-6)
        # Along a line through a row the density is a density: it falls far away.
        assert (model.score_samples(table + [[1e4, 0.0]]) < scores).all()
    elif kind == "half":
        assert np.isfinite(model.score_samples(table.astype(np.float16))).all()
    else:
        bad = {"NaN": np.full((2, 2), np.nan), "wide": np.ones((2, 3)), "none": np.empty((0, 2))}[kind]
        with pytest.raises(ValueError, match=r"NaN|features|sample"):
            model.score_samples(bad)


# ---------------------------------------------------------------------------------------------------------------- runs


def run(name, examples, **settings):
    """Check a property in so many cases; returns how many there were."""
    body, drawn, *_ = PROPERTIES[name]
    count = 0

    @functools.wraps(body)
    def counted(**case):
        nonlocal count
        count += 1
        body(**case)

    with_settings = hypothesis.settings(max_examples=examples, **COMMON, **settings)
    with_settings(hypothesis.given(**drawn)(counted))()
    return count


@pytest.mark.parametrize("name", PROPERTIES)
def test_it_holds(name):
    assert run(name, PROPERTIES[name][2], derandomize=True) >= min(4, PROPERTIES[name][2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PROPERTIES)
def test_it_holds_in_many_cases(name):
    count = run(name, PROPERTIES[name][3])
    print(f"{name}: {count} cases")
    assert count >= PROPERTIES[name][3]


def test_thousands_of_cases_are_drawn():
    """By the slow run, in which every property draws at least as many as it asks for."""
    assert sum(slow for *_, slow in PROPERTIES.values()) > 2000
