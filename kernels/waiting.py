"""How threads of the libraries wait for one another: asleep.

By default they spin: OpenMP's (torch's libgomp for milliseconds, Intel's for 200 ms), and OpenBLAS's. On
cores that others use too, a thread that spins spends the turn of the one it waits for: with two other busy
processes on two cores, small products took eleven times as long (docs/speed.md). No bit depends on it. The
libraries read these when they start, so they are set before torch is loaded, and for every process of ours.
"""

from __future__ import annotations

from collections.abc import Mapping

# The first is OpenMP's own, of either library; the second the exponent of OpenBLAS's cycles.
WAITING_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "4"}
# Whoever sets one of these has decided how long OpenMP spins.
_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def waiting_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What is to be added to an environment for threads to sleep while they wait: nothing that it decides."""
    decided = {*environment, *(["OMP_WAIT_POLICY"] if environment.keys() & set(_SPINNING) else [])}
    return {name: value for name, value in WAITING_VARIABLES.items() if name not in decided}
