"""A density estimator for tables, in the interface of scikit-learn: :class:`NDMDensity`."""

try:
    from ndm_ct.estimator.density import NDMDensity
except ImportError as error:
    raise ImportError("ndm_ct.estimator needs scikit-learn 1.6 or later: pip install 'ndm-ct[demo]'.") from error

__all__ = ["NDMDensity"]
