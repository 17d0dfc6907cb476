"""What an estimator says of its own density: samples beside held-out rows, and anomalies among them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ndm_ct._core.checks import validate_count
from ndm_ct.columns import COMPARED, LEAST_COMPARED, SAMPLES, Anomalies, Diagnosis, Scored, Table, diagnose
from ndm_ct.estimator.tables import framed, index_of, read_numbers

__all__ = ["Diagnosed"]


class Diagnosed:
    """Methods of :class:`~ndm_ct.estimator.NDMDensity` that use the rows held out from its training."""

    table_: Table
    held_out_: np.ndarray
    _anomalies: Anomalies | None

    def _scored(
        self, numbers: np.ndarray, *, observed: Sequence[int] = (), samples: int = SAMPLES,
        batch_size: int | None = None,
    ) -> Scored:  # fmt: skip
        raise NotImplementedError

    def _draws(self, numbers: np.ndarray, random_state: Any) -> np.ndarray:
        raise NotImplementedError

    def diagnose(self, X: Any = None, *, n: int = COMPARED, random_state: Any = None) -> Diagnosis:
        """Compare samples with rows that the density has not seen; ``print`` the result for a verdict.

        Args:
            X: rows, ``(n_samples, n_features)``. None takes those held out in training, which chose the weights that
                were kept.
            n: number of rows, and of samples, that are compared at most.
            random_state: seed or source of seeds.

        Returns:
            Differences of columns, pairs of columns and all columns, with p-values (:mod:`ndm_ct.columns.diagnosis`).
            :func:`ndm_ct.plots.diagnosis` draws it.

        Raises:
            ValueError: there are fewer than 50 rows, which show no difference that matters.

        Example:
            >>> import numpy as np
            >>> from ndm_ct.estimator import NDMDensity
            >>> rows = np.random.default_rng(0).normal(size=(1000, 2))
            >>> density = NDMDensity(width=16, steps=50, random_state=0).fit(rows)
            >>> diagnosis = density.diagnose(n=100, random_state=0)
            >>> diagnosis.trusted, len(diagnosis.differences)
            (True, 3)
        """
        check_is_fitted(self)
        numbers = self.held_out_ if X is None else read_numbers(self, X)
        count = validate_count("n", n)
        if min(len(numbers), count) < LEAST_COMPARED:
            raise ValueError(
                f"diagnose compares {LEAST_COMPARED} rows or more with samples, got {min(len(numbers), count)}; "
                "pass X=, or hold out more rows by validation_fraction."
            )
        random = check_random_state(random_state)
        numbers = numbers[random.permutation(len(numbers))[:count]]
        scored = self._scored(numbers)
        samples = self._draws(np.full((count, numbers.shape[1]), np.nan), random)
        return diagnose(
            [column.name for column in self.table_.coding.columns], numbers, samples,
            Anomalies(scored.log_p, scored.stderr), scored.truncation,
            np.random.default_rng(random.randint(2**31 - 1)),
        )  # fmt: skip

    def p_values(self, X: Any, *, return_std: bool = False) -> Any:
        r"""How rare rows are: the rank of their scores among those of rows held out in training, ``(n_samples,)``.

        .. math::
            p(x) = \frac{1}{n + 1} \Bigl(1 + \sum_{i=1}^n \Phi\Bigl(\frac{s(x) - s_i}{\sqrt{e(x)^2 + e_i^2}}\Bigr)\Bigr)

        with scores s and their standard errors e. Of rows like the training rows a share p has a p-value of p or less,
        whether or not the density is right; the smallest is 1 / (n + 1). The first call scores the held-out rows.

        Args:
            X: rows, ``(n_samples, n_features)``.
            return_std: also return standard errors: of few held-out rows, and of the scores.

        Raises:
            ValueError: no rows were held out.
        """
        numbers = read_numbers(self, X)
        if not len(self.held_out_):
            raise ValueError("p_values needs held-out rows; fit with validation_fraction > 0 and more rows.")
        if self._anomalies is None:
            held = self._scored(self.held_out_)
            self._anomalies = Anomalies(held.log_p, held.stderr)
        found = self._scored(numbers)
        p, error = (framed(self, each, index_of(X)) for each in self._anomalies.p_values(found.log_p, found.stderr))
        return (p, error) if return_std else p
