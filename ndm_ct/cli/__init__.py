"""The command line ``ndm-ct``: train, score, sample and describe models without a script."""

from ndm_ct.cli.commands import main

__all__ = ["main"]
