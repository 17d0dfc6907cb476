r"""The likelihood of a data set: a mean over rows with its standard error, to any accuracy the rows allow.

For rows visited in a random order, each with an independent unbiased estimate :math:`\hat\ell_i` of its negative
log-likelihood :math:`\ell_i`,

.. math::
    \bar\ell = \frac1n \sum_{i=1}^n \hat\ell_i, \qquad
    \mathrm{se}^2 = \frac{1}{n (n-1)} \sum_{i=1}^n (\hat\ell_i - \bar\ell)^2, \qquad
    \mathrm{se}_{est}^2 = \frac{1}{n^2} \sum_{i=1}^n \operatorname{Var}(\hat\ell_i \mid x_i) .

The first error is that of the expected value in the population from which the rows were drawn: the scatter of the
estimates is that of the data and of the estimator together. The second is the standard error of the mean over exactly
these rows: the only uncertainty left once the whole data set has been scored. Neither includes the solver's error,
which is systematic.

Some estimators give every row an error of its own. For the others the variance is measured on the first rows, the
pilot, and its mean stands for the rest: by further sweeps along the same path, or by a second, independent score for
integer data, whose noise is random too. The pilot has 32 rows. It is doubled, up to 256 rows, as long as fewer than
about four of them make up the variance.

A row may be estimated roughly, because errors of rows average out. With variance D of the data and v of a sweep, the
work for a given standard error is (path + sweep) (D + v). It is smallest for a sweep that is cheap next to the many
evaluations of the path. So the default here is one sweep of four nodes, and no error budget.

Two models are compared by the paired differences :math:`d_i = \hat\ell^a_i - \hat\ell^b_i` under common random numbers
(rows, dequantisation noise, nodes, probes). What the models share cancels:

.. math::
    \operatorname{Var} d = \operatorname{Var} \hat\ell^a + \operatorname{Var} \hat\ell^b
    - 2 \operatorname{Cov}(\hat\ell^a, \hat\ell^b) .

All randomness is a function of the seed and of a row's position in the random order. So an evaluation that was killed
and continued gives the same bits as one that was not. Batches of another size give the same values up to rounding.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from ndm_ct.data.containers import CondFrom
from ndm_ct.evaluation.results import Comparison, Evaluation, mean, paired
from ndm_ct.evaluation.run import Limits, Run
from ndm_ct.evaluation.scores import Settings
from ndm_ct.likelihood.options import Trace
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation, resolve_optional
from ndm_ct.storage.atomic import PathLike

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]

T = TypeVar("T")


def evaluate(
    model: NDM,
    data: Any,
    *,
    cond: Mapping[str, Any] | None = None,
    cond_from: CondFrom = None,
    quantisation: int | Quantisation | None = None,
    dequantisation: str = "uniform",
    bound: str = "ode",
    samples: int | None = None,
    stderr: float | None = None,
    batch_size: int = 64,
    max_rows: int | None = None,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    seed: int = 0,
    run_dir: PathLike | None = None,
    resume: bool = True,
    progress: bool = True,
    time_limit: float | None = None,
) -> Evaluation:
    r"""The mean negative log-likelihood of data, with its standard error.

    Rows are scored in a random order that is a function of the seed, each once. So the rows scored so far are a random
    sample of the data at every moment. Ctrl-C returns the result of the finished rows.

    With ``run_dir`` the folder receives ``rows.jsonl``, with a line per batch, and ``evaluation.json`` with the result.
    The same call continues an evaluation that was killed or stopped. ``stderr``, ``max_rows`` and ``time_limit`` may
    change from call to call.

    Args:
        model: the model.
        data: rows in any of the containers of :func:`ndm_ct.fit`: real values, or integers together with
            ``quantisation``. A float array takes the model's dtype. An iterable is read to its end, and its rows are
            kept in memory. Every process of a distributed job passes all rows.
        cond: conditioning by name, each with one row per row of ``data``.
        cond_from: which parts of an item, or which columns of a DataFrame, are conditioning, as in :func:`ndm_ct.fit`.
        quantisation: for integer data, the number of levels, whose bins fill (-1, 1), or a
            :class:`~ndm_ct.quantisation.Quantisation` that says where they lie, as a network of :mod:`ndm_ct.adapters`
            needs. The result is then the bound on :math:`-\log P(x)` of :func:`ndm_ct.bits_per_dim`, in nats and in
            bits per dimension.
        dequantisation: noise in the bins of integer data: "uniform" for models trained with uniform noise in the bins,
            or "process" for models trained on the bin centres.
        bound: "ode", the likelihood of the probability flow, or "elbo", the bound of :func:`ndm_ct.elbo`.
        samples: for "elbo", pairs of time and noise per row, at least 2; None is 2. In few dimensions they scatter far
            more than rows do, so take 64.
        stderr: the standard error to stop at, nats per event. It is looked at after each batch from 256 rows on, so
            that a lucky first batch does not stop the evaluation. None scores all data.
        batch_size: rows solved together. A smaller number needs less memory; values change by rounding only.
        max_rows: most rows to score; None is all. The last batch is cut short to end there.
        trace: for "ode", how the divergence is computed: "exact" without random error, or "quadrature", "hutchinson"
            or an object of :mod:`ndm_ct.divergence` by random probes. None or "auto" is exact up to 32 dimensions, else
            ``divergence.Quadrature(nodes=4, probes=1, sweeps=1)``, which is cheap and averages out over the rows.
        rtol: for "ode", relative tolerance of the solver. A smaller one takes more network evaluations and moves every
            value closer to the exact solution of the flow. None is the default of the trace: 2e-6, and for
            "quadrature" 3e-5.
        atol: for "ode", absolute tolerance of the solver, for states near zero; None as for ``rtol``.
        method: for "ode", the solver: "ode", "exponential" or a torchdiffeq method such as "dopri5"; None as in
            :func:`ndm_ct.loglik`.
        on_failure: for "ode", what to do if a row cannot be solved: "raise" a SolverError, or "nan" to leave the row
            out. Such rows are counted and named in the result.
        seed: of the order of the rows and of all noise. The same seed gives the same values.
        run_dir: folder of the evaluation, made if missing. None writes nothing.
        resume: whether ``run_dir`` may hold rows from before. False raises a ValueError if it does.
        progress: whether to show a progress bar.
        time_limit: seconds after which to stop. At least one batch is scored.

    Returns:
        An :class:`Evaluation`.

    Raises:
        TypeError: the data are integers and ``quantisation`` is None, or an argument has the wrong type.
        ValueError: an argument is out of range or has no effect; the data do not fit the model; ``run_dir`` holds work
            of other settings, data or weights, which are named; or processes got different rows or arguments.
        CheckpointError: the rows in ``run_dir`` are damaged.
        BlockingIOError: another process works in ``run_dir``.
        SolverError: a solve failed. The error has t, dt and the rows' numbers in the data.
        KeyboardInterrupt: Ctrl-C came before any batch was finished.

    Example:
        >>> import torch, ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x = model.sample_data(64)
        >>> result = evaluate(model, x, progress=False)
        >>> abs(result.nll - 2.838) < 5 * result.stderr, result.rows, result.reason
        (True, 64, 'data')
    """
    options = locals() | {"quantisation": resolve_optional(quantisation)}
    run = Run(
        "evaluation", {"model": model}, data, cond,
        _select(Settings, options), _select(Limits, options), run_dir, resume, evaluate, cond_from,
    )  # fmt: skip
    with run.in_folder():
        reason = run.run(progress)
        values = run.values()[0]
        (nll, error), (part, uncertainty) = mean(values), run.estimator_stderr()
        result = Evaluation(
            nll=nll, stderr=error, estimator_stderr=part, estimator_uncertainty=uncertainty,
            bits_per_dim=run.bits(nll), bits_stderr=run.bits(error), values=values, nfe=run.nfe(0),
            **run.shared(reason),
        )  # fmt: skip
        run.summarise(result)
    return result


def compare(
    model_a: NDM,
    model_b: NDM,
    data: Any,
    *,
    cond: Mapping[str, Any] | None = None,
    cond_from: CondFrom = None,
    quantisation: int | Quantisation | None = None,
    dequantisation: str = "uniform",
    bound: str = "ode",
    samples: int | None = None,
    stderr: float | None = None,
    batch_size: int = 64,
    max_rows: int | None = None,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    seed: int = 0,
    run_dir: PathLike | None = None,
    resume: bool = True,
    progress: bool = True,
    time_limit: float | None = None,
) -> Comparison:
    r"""Which of two models is better, from paired differences on the same rows with common random numbers.

    Both models get the same rows, dequantisation noise, nodes and probes. (With "process" each model scales the same
    uniform numbers to the width of its own noise.) Whatever the two values of a row have in common cancels, so the
    difference is known far better than either mean.

    Args:
        model_a: one model.
        model_b: the other model, of the same event shape, dtype and device. Everything else may differ.
        data: rows in any of the containers of :func:`ndm_ct.fit`: real values, or integers together with
            ``quantisation``. Every process of a distributed job passes all rows.
        cond: conditioning by name, each with one row per row of ``data``. Both models get it.
        cond_from: which parts of an item, or which columns of a DataFrame, are conditioning, as in :func:`ndm_ct.fit`.
        quantisation: the bins of integer data, or their number on (-1, 1). Values are then bounds on
            :math:`-\log P(x)`, and the difference is given in bits per dimension too.
        dequantisation: noise in the bins of integer data: "uniform" for models trained with uniform noise in the bins,
            or "process" for models trained on the bin centres.
        bound: what is compared: "ode", the likelihood of the probability flow, or "elbo", the bound of
            :func:`ndm_ct.elbo`.
        samples: for "elbo", pairs of time and noise per row, at least 2; None is 2. More of them lower the standard
            error and cost one network evaluation each.
        stderr: the standard error of the difference to stop at, nats per event. It is looked at after each batch from
            256 rows on. None scores all data.
        batch_size: rows solved together. A smaller number needs less memory; values change by rounding only.
        max_rows: most rows to score; None is all.
        trace: for "ode", how the divergence is computed: "exact" without random error, or "quadrature", "hutchinson"
            or an object of :mod:`ndm_ct.divergence` by random probes. None or "auto" is exact up to 32 dimensions, else
            ``divergence.Quadrature(nodes=4, probes=1, sweeps=1)``.
        rtol: for "ode", relative tolerance of the solver. A smaller one takes more network evaluations and moves every
            value closer to the exact solution of the flow. None is the default of the trace: 2e-6, and for
            "quadrature" 3e-5.
        atol: for "ode", absolute tolerance of the solver, for states near zero; None as for ``rtol``.
        method: for "ode", the solver: "ode", "exponential" or a torchdiffeq method such as "dopri5"; None as in
            :func:`ndm_ct.loglik`.
        on_failure: for "ode", what to do if a row cannot be solved: "raise" a SolverError, or "nan" to leave out rows
            that fail in either model. They are counted and named in the result.
        seed: of the order of the rows and of all noise. The same seed gives the same values.
        run_dir: folder for the scored rows (``rows.jsonl``) and the result (``comparison.json``), made if missing. The
            same call continues a comparison that was stopped. None writes nothing.
        resume: whether ``run_dir`` may hold rows from before. False raises a ValueError if it does.
        progress: whether to show a progress bar.
        time_limit: seconds after which to stop. At least one batch is scored.

    Returns:
        A :class:`Comparison`.

    Raises:
        TypeError, ValueError, CheckpointError, BlockingIOError, SolverError, KeyboardInterrupt: as in :func:`evaluate`.
        ValueError: the models differ in event shape, dtype or device.

    Example:
        >>> import torch, ndm_ct
        >>> wide, right = (ndm_ct.reference.Gaussian(torch.zeros(2), s * torch.eye(2)) for s in (4.0, 1.0))
        >>> x = right.sample_data(64, generator=torch.Generator().manual_seed(0))
        >>> result = compare(wide, right, x, progress=False)
        >>> result.difference > 4 * result.stderr > 0.0
        True
    """
    options = locals() | {"quantisation": resolve_optional(quantisation)}
    run = Run(
        "comparison", {"model_a": model_a, "model_b": model_b}, data, cond,
        _select(Settings, options), _select(Limits, options), run_dir, resume, compare, cond_from,
    )  # fmt: skip
    with run.in_folder():
        reason = run.run(progress)
        a, b = run.values()
        found = paired(a, b)
        result = Comparison(
            **found, bits_per_dim=run.bits(found["difference"]), bits_stderr=run.bits(found["stderr"]), values_a=a,
            values_b=b, nfe_a=run.nfe(0), nfe_b=run.nfe(1), **run.shared(reason),
        )  # fmt: skip
        run.summarise(result)
    return result


def _select(kind: type[T], options: Mapping[str, Any]) -> T:
    """An object of those options for which it has fields."""
    return kind(**{field.name: options[field.name] for field in fields(cast(Any, kind))})
