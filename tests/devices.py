"""The device that tests of models and sessions run on: the CPU, or what KVS_TEST_DEVICE names (make test-cuda says "cuda")."""

import os

DEVICE = os.environ.get("KVS_TEST_DEVICE", "cpu")
