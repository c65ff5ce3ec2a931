"""What `system_info` tells."""

from __future__ import annotations

import email.message
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from fulltune_nb import device, doctor
from fulltune_nb.cpu import ensure_fast_blas, kernel_folder
from fulltune_nb.doctor import main
from fulltune_nb.system_info import arithmetic, keeps_float32, system_info
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.family_cases import PUBLISHED
from nbs_tests.models.real_configs import EXPECTED


def test_it_names_versions_device_memory_and_blas():
    info = system_info()
    assert info.mlx == mx.__version__ and info.blas == ensure_fast_blas()
    assert info.memory_total > 2**28 and info.cores >= 1 and info.matmul_gflops is None
    assert info.compiler == shutil.which("g++")
    assert "\n" not in repr(info) and info.transformers in repr(info)


def test_the_html_shows_the_same_facts():
    page = system_info()._repr_html_()
    assert page.startswith("<table") and mx.__version__ in page and "not measured" in page


def test_what_the_last_digits_depend_on_is_named(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    named = arithmetic()
    assert named["device"] == system_info().device and named["BLAS"] == f"{ensure_fast_blas().name}, threads: 7"
    monkeypatch.setenv("FULLTUNE_KERNELS", "off")
    assert arithmetic()["kernels"] == "MLX's"
    monkeypatch.setattr(kernel_folder, "_found", kernel_folder.KernelFolder(None, "no room"))
    assert arithmetic()["mx.compile"] == "off" and "none: no room" in repr(system_info())


@pytest.mark.skipif("OpenBLAS" not in ensure_fast_blas().name, reason="only an OpenBLAS can be told for which processor to compute")
def test_the_processor_that_the_blas_computes_for_is_named():
    code = "from fulltune_nb.system_info import arithmetic; print(arithmetic()['BLAS kernels'])"
    other = {"x86_64": "Nehalem", "aarch64": "ARMV8"}[os.uname().machine]
    named = subprocess.check_output([sys.executable, "-c", code], text=True, env={**os.environ, "OPENBLAS_CORETYPE": other})
    assert named.strip().upper() == other.upper() and arithmetic()["BLAS kernels"]


def test_a_gpu_names_how_float32_products_are_made(monkeypatch):
    with gpu_like():
        assert arithmetic() == {"device": "gpu Apple M3 Max", "float32 products": "float32"}  # what the CPU below makes of them
        monkeypatch.setattr(mx, "full", lambda shape, value: mx.ones(shape))  # what TF32 makes of such a factor
        keeps_float32.cache_clear()
        assert arithmetic()["float32 products"] == "TF32" and "MLX_ENABLE_TF32=0" in repr(system_info())
    keeps_float32.cache_clear()


def test_the_command_shows_it_and_the_memory_that_training_may_take(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name, _ in system_info().facts()) and "training may take" in shown
    assert main(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["arithmetic"] == arithmetic() and list(told["models"]) == list(doctor.MODELS)


@pytest.mark.parametrize("model", doctor.MODELS)
def test_the_memory_that_a_model_needs_is_that_of_its_published_config(model):
    published = {**PUBLISHED, "Llama 3.2 1B": EXPECTED["llama-3.2-1b"][0], "Mistral 7B v0.3": EXPECTED["mistral-7b-v0.3"][0]}[model]
    assert doctor.peaks(doctor.config_of(model)) == doctor.peaks(published)


def test_a_model_fits_where_its_peak_is_within_the_limit(monkeypatch, capsys):
    small = doctor.peaks(doctor.config_of("Qwen3 0.6B"))
    monkeypatch.setattr(device, "machine_limit", lambda: small["fast"])
    assert main([]) == 0
    lines = {line.strip()[:16].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["Qwen3 0.6B"].count("fits") == 2 and lines["Qwen3 32B"].count("fits") == 0


def test_an_extra_whose_packages_are_missing_or_too_old_is_told_with_its_command(monkeypatch, capsys):
    def version(name: str) -> str:
        if name == "ipywidgets":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "papermill" else "999"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = dict(doctor.missing())
    assert found["notebook"] == ["ipywidgets", "papermill"] and found["pandas"] == []
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "missing ipywidgets, papermill: pip install 'fulltune_nb[notebook]'" in shown and "cuda13" not in shown.split("Extras:")[1]


def test_what_an_included_extra_lacks_is_missing_of_the_extra_that_includes_it(monkeypatch):
    lines = ['no-such-panels; extra == "notebook"', 'fulltune_nb[notebook]; extra == "optuna"', 'no-such-one; extra == "optuna"', "numpy"]
    told = email.message.Message()
    for extra in ("notebook", "optuna", "cpu"):
        told["Provides-Extra"] = extra
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: told)
    assert dict(doctor.missing()) == {"notebook": ["no-such-panels"], "optuna": ["no-such-panels", "no-such-one"]}


def test_a_checkout_on_the_path_has_no_extras_to_tell(monkeypatch):
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert dict(doctor.missing()) == {}


def test_speed_is_measured_when_asked_for():
    assert system_info(measure=True).matmul_gflops > 0.5
