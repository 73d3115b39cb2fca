"""Settings of all tests."""

import os


# Set before anything imports huggingface_hub: the tests need no network, and must not wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several workers share few cores; threads that wait for each other on tiny models made the suite four times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
