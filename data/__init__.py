"""Data and what the commands need around it. Importing it settles how OpenMP's threads wait, so it comes before torch, which starts them."""

import os

# By default they spin while they wait; where other processes want the cores too, that slows a step tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
