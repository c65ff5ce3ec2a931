"""The small models and data of the trainer's tests."""

from nbs_tests.training.conftest import make_data, make_lm, make_trainer

__all__ = ["make_data", "make_lm", "make_trainer"]
