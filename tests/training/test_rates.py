"""Optimisers and schedulers of one's own, and weights of rows."""

import pytest
import torch
from stopping import StopAt
from test_training import mixture, quick, same, toy

import ndm_ct

SCHEDULERS = torch.optim.lr_scheduler
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_of_ones_own_resumes_with_the_same_bits(tmp_path, kind):
    whole, rest = toy(), toy()
    quick(whole, steps=9, optimizer=OPTIMIZERS[kind])
    options = {"steps": 9, "optimizer": OPTIMIZERS[kind], "run_dir": tmp_path}
    assert quick(rest, callbacks=[StopAt(4)], **options).step == 4
    assert quick(rest, **options).finished
    assert same(whole, rest)
    assert not same(whole, toy())


def test_the_named_optimizer_made_by_hand():
    """With the groups of the default optimiser the weights are the same."""
    named, own = toy(), toy()
    quick(named, lr=1e-2)

    def make(parameters):
        groups = [[p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]]
        return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2)

    result = quick(own, optimizer=make, log_every=1)
    assert [row["lr"] for row in result.history] == pytest.approx(
        [row["lr"] for row in quick(toy(), lr=1e-2, log_every=1).history]
    )
    for ours, theirs in zip(own.parameters(), named.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["onecycle", "steps", "exponential", "sequence"])
def test_a_scheduler_sets_the_rates_and_resumes(tmp_path, kind):
    make = {
        "onecycle": lambda o: SCHEDULERS.OneCycleLR(o, max_lr=1e-2, total_steps=9),
        "steps": lambda o: SCHEDULERS.MultiStepLR(o, [3, 6]),
        "exponential": lambda o: SCHEDULERS.ExponentialLR(o, 0.7),
        "sequence": lambda o: SCHEDULERS.SequentialLR(
            o, [SCHEDULERS.LinearLR(o, 0.1, total_iters=3), SCHEDULERS.CosineAnnealingLR(o, 6)], [3]
        ),
    }[kind]
    by_hand = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1e-3)
    rates, scheduler = [], make(by_hand)
    for _ in range(9):
        rates.append(by_hand.param_groups[0]["lr"])
        by_hand.step()
        scheduler.step()
    whole, rest = toy(), toy()
    found = quick(whole, steps=9, scheduler=make, log_every=1).history
    assert [row["lr"] for row in found] == rates
    options = {"steps": 9, "scheduler": make, "run_dir": tmp_path}
    assert quick(rest, callbacks=[StopAt(4)], **options).step == 4
    assert quick(rest, **options).finished
    assert same(whole, rest)


def test_another_optimizer_or_scheduler_does_not_continue(tmp_path):
    options = {"optimizer": OPTIMIZERS["sgd"], "scheduler": lambda o: SCHEDULERS.ExponentialLR(o, 0.7)}
    quick(toy(), run_dir=tmp_path, **options)
    for name, other in (
        ("optimizer", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("optimizer", OPTIMIZERS["adagrad"]),
        ("optimizer", "adam"),
        ("scheduler", lambda o: SCHEDULERS.ExponentialLR(o, 0.8)),
        ("scheduler", lambda o: SCHEDULERS.StepLR(o, 2)),
    ):
        with pytest.raises(ValueError, match=rf"other settings: .*{name}"):
            quick(toy(), run_dir=tmp_path, **options | {name: other})


def test_more_steps_with_a_scheduler_that_spans_them(tmp_path):
    make = {steps: lambda o, steps=steps: SCHEDULERS.CosineAnnealingLR(o, steps) for steps in (4, 8)}
    quick(toy(), steps=4, scheduler=make[4], run_dir=tmp_path)
    rows = quick(toy(), steps=8, scheduler=make[8], run_dir=tmp_path, log_every=1).history
    straight = quick(toy(), steps=8, scheduler=make[8], log_every=1).history
    assert [row["lr"] for row in rows[-4:]] == [row["lr"] for row in straight[-4:]]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": OPTIMIZERS["sgd"], "lr": 1e-3}, ValueError, "lr has no effect with an optimizer of your own"),
        ({"optimizer": OPTIMIZERS["sgd"], "weight_decay": 0.1}, ValueError, "weight_decay has no effect"),
        ({"scheduler": lambda o: SCHEDULERS.StepLR(o, 2), "warmup": 1}, ValueError, "warmup has no effect with a sch"),
        ({"scheduler": lambda o: SCHEDULERS.StepLR(o, 2), "lr_final": 1.0}, ValueError, "lr_final has no effect"),
        ({"optimizer": 3}, TypeError, "optimizer must be a name or a function"),
        ({"optimizer": lambda p: None}, TypeError, r"must return a torch\.optim\.Optimizer.*NoneType"),
        ({"optimizer": torch.optim.LBFGS}, TypeError, "no closure, got LBFGS"),
        ({"scheduler": "cosine"}, TypeError, "scheduler must be a function"),
        ({"scheduler": SCHEDULERS.ReduceLROnPlateau}, TypeError, "depends on the step alone, got ReduceLROnPlateau"),
        ({"sample_weight": torch.ones(3)}, ValueError, r"shape \(3,\), expected \(64,\)"),
        ({"sample_weight": -torch.ones(64)}, ValueError, "at least 0"),
        ({"sample_weight": torch.zeros(64)}, ValueError, "not all 0"),
        ({"sample_weight": torch.ones(64), "objective": lambda m, x, generator: ndm_ct.loss(m, x).mean()}, ValueError,
         r"objective returned shape \(\), sample_weight needs"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(options, error, words):
    with pytest.raises(error, match=words):
        quick(toy(), **options)


def test_weighted_rows_are_rows_that_occur_so_often(tmp_path):
    """The gradient of a whole batch: weights 0, 1, 2 are the rows left out, once and twice."""
    x, times = mixture(60), torch.arange(60) % 3

    def objective(model, rows, generator):
        return (model.predictor.net(rows, torch.full((len(rows),), 0.5)) - rows).square().sum(1)

    weighted, repeated, plain = toy(), toy(), toy()
    quick(weighted, x, batch_size=60, steps=1, sample_weight=7 * times.numpy(), objective=objective)
    quick(repeated, x.repeat_interleave(times, 0), batch_size=60, steps=1, objective=objective)
    quick(plain, x, batch_size=60, steps=1, objective=objective)
    for a, b in zip(weighted.parameters(), repeated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not same(weighted, plain)
    even, same_rows = toy(), toy()
    quick(even, x, sample_weight=torch.full((60,), 3.0), batch_size=16, run_dir=tmp_path)
    quick(same_rows, x, batch_size=16)
    assert same(even, same_rows)
    with pytest.raises(ValueError, match="sample_weight"):
        quick(toy(), x, batch_size=16, run_dir=tmp_path)


def test_an_optimiser_of_other_parameters_is_refused():
    model = ndm_ct.NDM(ndm_ct.nn.MLP(2, width=4), (2,))
    other = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="must hold the parameters that it is called with"):
        ndm_ct.fit(model, torch.randn(8, 2), steps=1, progress=False, optimizer=lambda _: torch.optim.Adam(other))
