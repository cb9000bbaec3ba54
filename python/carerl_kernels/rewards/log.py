"""The log of everything in here: calls and retries of judges, what could not be judged and why."""

import logging

LOGGER = logging.getLogger("carerl_kernels.rewards")
