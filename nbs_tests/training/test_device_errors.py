"""What MLX raises because of its device becomes an error that says what helps, and weights that a GPU may have spoilt are refused."""

import mlx.core as mx
import pytest

import fulltune_nb as ft
from fulltune_nb import device
from fulltune_nb.command_line import run
from fulltune_nb.errors import IN_TRAINING, DeviceError, OutOfMemoryError, TornStepError, device_error
from fulltune_nb.models.decoder import Decoder
from nbs_tests.gpu_like import gpu_like

METAL = "[METAL] Command buffer execution failed: "
MEMORY = [  # texts of MLX 0.32, with what Metal and CUDA put into them
    METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    "[malloc] Unable to allocate 9000000000 bytes.",
    "[malloc_or_wait] Unable to allocate 9000000000 bytes.",
    "[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum allowed buffer size of 30150672384 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "cudaMallocManaged(&data, size) failed: out of memory",
    "cudaGraphInstantiate(&graph_exec, graph, nullptr, nullptr, 0) failed: out of memory",
    "cublasLtMatmul(handle_, matmul_desc_, alpha_ptr, a) failed with code: 3.",
]
TIME = [
    METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    METAL + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
    METAL + "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang).",
    "cudaStreamSynchronize(stream) failed: the launch timed out and was terminated",
]
FAILED = [
    METAL + "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
    METAL + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
    "cudaPeekAtLastError() failed: an illegal memory access was encountered",
]


@pytest.mark.parametrize("text", MEMORY + TIME + FAILED)
def test_every_text_becomes_an_error_with_what_helps(text):
    found = device_error(RuntimeError(text), IN_TRAINING)
    assert type(found) is (OutOfMemoryError if text in MEMORY else DeviceError)
    assert text.rstrip(".") in str(found) and ("restart python" in str(found).lower() if text in FAILED else "batch_size" in str(found))
    assert ("display" in str(found)) == (text in TIME)
    assert found.late == ("METAL" in text or "Synchronize" in text or "PeekAtLastError" in text)


def test_a_kernel_that_cannot_be_compiled_is_told_with_the_compilers_reason():
    text = f"[Compile::eval_cpu] Failed to compile function {'f4' * 300}: g++ -o tmp.so: final link failed: No space left on device"
    for said in (text, "Could not load C++ shared library x.so: file too short", "filesystem error: cannot create directories"):
        found = device_error(RuntimeError(said), IN_TRAINING)
        assert type(found) is DeviceError and said[-50:] in str(found) and "Make room" in str(found) and "TMPDIR" in str(found)
        assert len(str(found)) < 900 and not found.late


def test_what_is_something_else_stays_what_it_is():
    for error in (
        RuntimeError("[matmul] Last dimension of first input with shape (2,3)"),
        ValueError("out of memory"),
        TornStepError("malloc"),
    ):
        assert device_error(error, IN_TRAINING) is None
    assert type(device_error(MemoryError(), IN_TRAINING)) is OutOfMemoryError and device_error(MemoryError("std::bad_alloc"), IN_TRAINING)


def fails(text):
    def broken(*_, **__):
        raise RuntimeError(text)

    return broken


def test_wherever_a_model_computes(make_lm, make_trainer, monkeypatch):
    trainer, lm = make_trainer(), make_lm()
    computes = [
        trainer.step, trainer.run, lambda: trainer.evaluate("valid"),
        lambda: ft.find_lr(trainer, steps=10), lambda: lm.generate("the quick"),
        lambda: list(lm.stream("the quick")), lambda: lm.chat_many([[{"role": "user", "content": "a"}]]),
        lambda: ft.token_losses(lm, trainer.data.valid[:1]), lambda: ft.trace(lm, "the quick"),
        lambda: ft.preflight(trainer.lm, trainer.data, trainer.config, measure=True),
    ]  # fmt: skip
    monkeypatch.setattr(Decoder, "embed", fails(MEMORY[1]))
    for compute in computes:
        with pytest.raises(OutOfMemoryError, match="9000000000 bytes") as raised:
            compute()
        assert type(raised.value.__cause__) is RuntimeError
    assert trainer.lm.torn is None


def test_a_step_names_the_last_checkpoint_and_changes_nothing(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2)
    trainer.run(3)
    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError, match=r"The last checkpoint is .*run/checkpoints/step-000002\."):
        patch.setattr(trainer.engine, "gradients", fails(MEMORY[1]))
        trainer.step()
    assert trainer.state == "failed" and trainer.lm.torn is None
    trainer.run()
    assert trainer.state == "done"


def test_the_command_tells_it_in_a_line_and_ends_with_1(capsys):
    assert run(fails(MEMORY[5])) == 1
    assert capsys.readouterr().err.startswith("error: Memory ran out: cudaMallocAsync")


@pytest.mark.parametrize("text", [MEMORY[0], TIME[1], FAILED[2]])
def test_on_a_gpu_an_update_that_may_have_failed_unseen_makes_the_weights_unusable(make_trainer, monkeypatch, text):
    """A GPU tells of a failure when a later result is waited for: that of the next step may be that of the update before it."""
    with gpu_like():
        trainer = make_trainer()
        with monkeypatch.context() as patch, pytest.raises(DeviceError):
            patch.setattr(trainer.engine, "gradients", fails(text))
            trainer.step()  # no update was under way
        snapshot = trainer.snapshot()
        trainer.step()
        with monkeypatch.context() as patch, pytest.raises(TornStepError, match="before the update of step 1 was known to be whole"):
            patch.setattr(trainer.engine, "gradients", fails(text))
            trainer.step()
        for use in (trainer.step, trainer.snapshot, lambda: trainer.lm.generate("a")):
            with pytest.raises(TornStepError):
                use()
        trainer.restore(snapshot)
        with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError):
            patch.setattr(trainer.engine, "gradients", fails(MEMORY[1]))  # the host found no memory: nothing was sent
            trainer.step()
        assert trainer.step().step == 1


def test_a_failure_that_is_found_when_a_run_ends_makes_them_unusable_too(make_trainer, monkeypatch):
    with gpu_like():
        trainer = make_trainer()
        monkeypatch.setattr(device, "device_kind", lambda: "metal")
        monkeypatch.setattr(mx, "set_wired_limit", lambda limit: 0)
        monkeypatch.setattr(mx, "synchronize", fails(MEMORY[0]))
        with pytest.raises(OutOfMemoryError):
            trainer.run(1)
        with pytest.raises(TornStepError, match="update of step 1"):
            trainer.lm.generate("a")


def test_whoever_uses_the_weights_first_finds_the_failed_update(make_trainer, monkeypatch):
    with gpu_like():
        trainer = make_trainer()
        trainer.step()
        monkeypatch.setattr(mx, "eval", fails(MEMORY[0]))
        for use in (lambda: trainer.lm.generate("a"), lambda: trainer.evaluate("valid"), trainer.snapshot, trainer.step):
            with pytest.raises(TornStepError, match="Insufficient Memory"):
                use()
