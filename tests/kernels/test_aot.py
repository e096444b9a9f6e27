"""The ahead-of-time compiler: how it reads what compilers write, and, where JAX has its CUDA plugin, a kernel."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tbik_jax.kernels import aot

HERE = Path(__file__).parent
PTX = """
.visible .entry first(
)
.maxntid 128, 1, 1
{
	mul.f32 	%r1, %r2, %r3;
	add.rn.f32 	%r4, %r1, %r5;
	fma.rn.f32 	%r6, %r2, %r3, %r5;
	add.f32 	%r7, %r6, %r5;
	add.s32 	%r8, %r1, %r5;
}
.visible .entry second(
)
{
	add.f32 	%r1, %r9, %r2;
	@%p1 sub.f32 	%r4, %r2, %r8;
	mul.rn.f32 	%r7, %r2, %r3;
	mov.b32 	%r8, %r7;
	mov.b64 	%rd1, {%r8, %r2};
	mov.b64 	{%r9, %r10}, %rd1;
	add.f32 	%r11, %r2, %r2;
}
"""
REPORT = """
ptxas info    : (C7519) warpgroup.arrive is injected in around line 264 by compiler to allow use of registers in GMMA
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to something
ptxas info    : (C7517) warpgroup.wait is injected in around line 3 by compiler to allow use of registers
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 90 registers, used 2 barriers, 1 bytes smem
"""


def test_a_product_is_contractible_only_into_a_plain_addition_of_its_own_kernel():
    assert aot.contractible(PTX) == ("add.f32 \t%r1, %r9, %r2;", "@%p1 sub.f32 \t%r4, %r2, %r8;")


def test_a_report_is_read(tmp_path):
    (tmp_path / "first_0.ptx").write_text(PTX)
    (tmp_path / "first_0.ptxas").write_text(REPORT)
    (tmp_path / "first_0.sass").write_text("HGMMA.64x128x16.F32.BF16 R24\nFFMA R1, R2, R3, R4\n")
    (tmp_path / "first_0.before_layout_inference.txt").write_text(
        "%c9_i32 = arith.constant 90136 : i32\n dynamic_shared_memory_size %c9_i32 {"
    )
    kernel = aot._read(tmp_path / "first_0.ptx")
    assert (kernel.name, kernel.threads, kernel.registers) == ("first", 128, 90)
    assert (kernel.spill_stores, kernel.spill_loads, kernel.stack, kernel.spilled) == (8, 4, 16, 28)
    assert (kernel.shared, kernel.fma, kernel.ffma, kernel.hgmma) == (90137, 1, 1, 1)
    assert len(kernel.messages) == 3
    assert [message[:7] for message in kernel.serialised] == ["(C7515)", "(C7517)"]
    text = io.StringIO()
    aot.show({"a case": [kernel]}, Console(file=text, width=160))
    assert "(C7515)" in text.getvalue()


def test_without_a_report_there_is_no_kernel(tmp_path):
    (tmp_path / "x.ptx").write_text(PTX)
    with pytest.raises(aot.UnavailableError, match=r"x\.ptx has no report"):
        aot._read(tmp_path / "x.ptx")


def test_without_ptxas_or_plugin_it_says_so(monkeypatch):
    monkeypatch.setattr(aot, "_need_ptxas", lambda: None)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", _no_plugin)
    with pytest.raises(aot.UnavailableError, match="no CUDA plugin"):
        aot.compiled(lambda x: x, ((1,), "float32"))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(aot.UnavailableError, match="no ptxas"):
        aot.compiled(lambda x: x, ((1,), "float32"))


def _no_plugin(*_, **__):
    raise NotImplementedError("topology not implemented for cuda")


def test_the_command_line_names_cases_and_refuses_others():
    listed = CliRunner().invoke(aot.app, ["--list"])
    assert listed.exit_code == 0
    assert "forward/qwen3-8b/down/tp1/m8192/chain" in listed.output.split()
    assert CliRunner().invoke(aot.app, ["no/such/*"]).exit_code == 2
    assert CliRunner().invoke(aot.app, []).exit_code == 2


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="JAX has no CUDA plugin here")
def test_a_kernel_compiles_for_an_h100():
    program = (
        "import hopper_toy\n"
        "from tbik_jax.kernels import aot\n"
        "arguments = ((128, 512), 'bfloat16'), ((256, 512), 'bfloat16')\n"
        "try: (kernel,) = aot.compiled(hopper_toy.product, *arguments)\n"
        "except aot.UnavailableError as error: print('unavailable', error)\n"
        "else: print(kernel.registers, kernel.wgmma, kernel.spilled, kernel.shared, len(kernel.contractible))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("unavailable"):
        pytest.skip(done.stdout)
    registers, wgmma, spilled, shared, contractible = map(int, done.stdout.split()[-5:])
    assert 64 <= registers <= 255
    assert (wgmma, spilled, contractible) == (4, 0, 0)
    assert 40_000 < shared < 50_000


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="JAX has no CUDA plugin here")
def test_stages_neither_spill_nor_contract(tmp_path):
    """The command line's exit status; and memory is read 16 bytes at a time."""
    command = [sys.executable, "-m", "tbik_jax.kernels.aot", "stage/*/4096", "stage/swiglu*", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no CUDA plugin" in done.stderr or "no ptxas" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = [path.read_text() for path in tmp_path.rglob("*.ptx")]
    assert kernels and all("ld.global.nc.v4.b32" in ptx and "st.global.v" in ptx for ptx in kernels)
