"""Every family computes what transformers does, on random small configurations: `python -m nbs_tests.models.family_parity`, in short."""

import mlx.core as mx
import pytest

from fulltune_nb.models.families import FAMILIES
from fulltune_nb.models.folder import load_decoder
from nbs_tests.models import family_cases, models_page
from nbs_tests.models.family_cases import INERT, KNOWN, PUBLISHED, SIZES, VALUES, cases_of, scaled_down
from nbs_tests.models.family_parity import EXACT, IDS_SHAPE, LIMITS, logits_limit, position_error, run
from nbs_tests.models.model_cases import random_ids
from nbs_tests.models.parity import need_torch, write_folder


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


PUBLISHED_HERE = [name for name, raw in PUBLISHED.items() if raw["model_type"] in FAMILIES]


@pytest.mark.parametrize("name", PUBLISHED_HERE)
def test_published_configurations_scaled_down_compute_what_transformers_does(name, tmp_path):
    need_torch()
    from nbs_tests.models import torch_reference as reference

    raw = scaled_down(PUBLISHED[name])
    model = reference.build(raw, 0)
    decoder = load_decoder(write_folder(tmp_path / "source", raw, reference.checkpoint(model)))
    ids = random_ids(raw, IDS_SHAPE, 0)
    expected = reference.logits(model, ids)
    error = position_error(decoder(mx.array(ids)), expected)
    assert error < EXACT or error < logits_limit(model, ids, expected)


def test_the_page_of_models_says_what_the_rows_say():
    """Where it does not: `python -m nbs_tests.models.models_page`, with `macs` or the names of the families."""
    text = models_page.PAGE.read_text(encoding="utf-8")
    found = {cells[0]: cells[1:3] for row in models_page.rows_of(text, "families") if (cells := models_page.cells(row))}
    assert found == {f"`{name}`": [KNOWN[name].checkpoints, models_page.mechanisms(family)] for name, family in FAMILIES.items()}
    assert models_page.rows_of(text, "macs") == models_page.mac_rows()


def test_the_errors_on_the_page_of_models_are_within_the_limits():
    for row in models_page.rows_of(models_page.PAGE.read_text(encoding="utf-8"), "families"):
        errors = dict(zip(models_page.COMPARED, models_page.cells(row)[3:], strict=True))
        assert all(float(errors[kind]) <= limit for kind, limit in LIMITS.items() if kind in errors), row
