"""Runs: what they train, what they leave, and how they are reported."""
