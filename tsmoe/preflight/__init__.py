"""Checks of machines, network, data and one training step, before hours are booked on them."""

from tsmoe.preflight.course import PreflightOptions, PreflightReport, run_preflight

__all__ = ["PreflightOptions", "PreflightReport", "run_preflight"]
