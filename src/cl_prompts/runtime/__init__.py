"""Processes, memory, processor and text. Knows nothing else of ours."""
