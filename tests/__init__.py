"""A package, so that no other one called tests hides `python -m tests.make_demo_models`."""
