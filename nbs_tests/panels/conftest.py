"""The trainer's small models and data, for panels."""

from nbs_tests.training.conftest import make_data, make_lm, make_trainer  # noqa: F401
