"""Metrics, evaluation, reference probes, reports and plots."""
