"""Processes, files, locks, memory, CPU and text for messages. Imports nothing else of this library."""
