"""Every family computes what transformers does, on random small configurations: `python -m nbs_tests.models.family_parity`, in short."""

import pytest

from fulltune_nb.models.families import FAMILIES
from nbs_tests.models import family_cases
from nbs_tests.models.family_cases import INERT, KNOWN, SIZES, VALUES, cases_of
from nbs_tests.models.family_parity import run
from nbs_tests.models.parity import need_torch


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_answers_engines_packing_and_saving_agree_with_transformers(family):
    need_torch()
    result = run(family, 2, new_tokens=16)
    assert not result.problems, "\n".join(result.problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_configuration_class_is_tried(family):
    assert set(family_cases.class_keys(family)) <= SIZES.keys() | VALUES.keys() | KNOWN[family].values.keys() | INERT
    cases = cases_of(family, 12)
    for key, choices in VALUES.items():
        if key in family_cases.class_keys(family) and key not in KNOWN[family].values:
            assert len({str(case.get(key)) for case in cases}) >= min(2, len(choices)), key
