"""Streams of tasks over Hugging Face data sets."""
