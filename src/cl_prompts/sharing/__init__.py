"""Adapters on the Hub: push, model cards, run records, images and base models."""
