"""The command line: ``tbik-jax generate``, ``verify``, ``bench``, ``info``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tbik_jax._console import err, out

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Bitwise-identical transformers on any device mesh.",
)

_MODEL = "smollm2, tiny, a Hugging Face folder, or a .gguf file."


def main() -> None:
    """Entry point. What a user got wrong is one message and exit status 2, not a traceback."""
    try:
        app()
    except (ValueError, NotImplementedError) as error:
        err.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _sizes(text: str, what: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{what} {text!r} is not a list of integers; write for example 1,2,3,4") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{what} {text!r}; every size is at least 1")
    return sizes


def _names(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise ValueError(f"{what} {text!r}: choose from {', '.join(known)}")
    return names


def _mesh(text: str) -> dict[str, int]:
    """``"4"`` or ``"tp=4"`` or ``"dp=2,tp=4"``."""
    axes = {"tp": 1, "dp": 1}
    for part in text.split(","):
        name, _, size = part.strip().rpartition("=")
        if name not in ("", "tp", "dp") or not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh {text!r}: write a number of devices, or tp=4, or dp=2,tp=4")
        axes[name or "tp"] = int(size)
    return axes


def _arrange_devices(count: int) -> None:
    """As many virtual CPU devices as the mesh wants, before JAX starts; real accelerators are what they are."""
    import jax

    wanted = os.environ.get("JAX_PLATFORMS", "") or "cpu"
    if wanted.split(",")[0] == "cpu":
        try:
            jax.config.update("jax_num_cpu_devices", max(count, 1))
        except RuntimeError:  # JAX has started already, in an embedding program; make_mesh counts what there is
            return


@contextmanager
def _bar(description: str) -> Iterator[Any]:
    if not err.is_terminal:  # a log gets a line for every step that has a name of its own
        said = ""

        def tell(done: int, total: int, text: str | None = None) -> None:
            nonlocal said
            if text and text != said:
                said = text
                print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(description, total=None)

        def update(done: int, total: int, text: str | None = None) -> None:
            progress.update(task, completed=done, total=total, description=text or description)

        yield update


def _contract(leaves: int, tree: str) -> Any:
    from tbik_jax.contract import Contract

    return Contract(leaves=leaves, tree=tuple(_sizes(tree, "--tree")))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    model: Annotated[str, typer.Option(help=_MODEL)] = "smollm2",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")] = False,
    mesh: Annotated[str, typer.Option(help="Devices: 4, tp=4, or dp=2,tp=4.")] = "1",
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest that reach p together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    numerics: Annotated[str, typer.Option(help="invariant or plain.")] = "invariant",
    leaves: Annotated[int, typer.Option(help="Contract: the largest mesh ever to be used.")] = 8,
    tree: Annotated[str, typer.Option(help="Contract: arities of the tree, from the leaves up.")] = "2",
) -> None:
    """Continue a prompt, or answer it, token by token."""
    axes = _mesh(mesh)
    _arrange_devices(axes["tp"] * axes["dp"])
    from tbik_jax.engine import Generator, Sampling, make_mesh
    from tbik_jax.models.loading import load
    from tbik_jax.models.open import open_model
    from tbik_jax.numerics import Numerics

    contract = _contract(leaves, tree)
    _names(dtype, ("float32", "bfloat16"), "--dtype")
    kind = _names(numerics, ("invariant", "plain"), "--numerics")[0]
    sampling, devices = Sampling(temperature, top_k, top_p), make_mesh(**axes)
    opened = open_model(model)
    if opened.tokenizer is None:
        raise ValueError(f"{opened.name} has no tokenizer; add tokenizer.json to its folder")
    tokenizer = opened.tokenizer
    text = _standard_input() if prompt == "-" else prompt
    ids = tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)
    chosen = Numerics.invariant(contract) if kind == "invariant" else Numerics.plain(contract)
    with _bar(f"loading {opened.name}") as update:
        loaded = load(opened.config, opened.source, chosen, devices, dtype=dtype, progress=update)
        generator = Generator(loaded, devices)
    stream, stop = tokenizer.stream(), tokenizer.eos_token_ids or opened.config.eos_token_ids
    if not chat:
        print(text, end="", flush=True)
    for step in generator.stream([ids], max_new_tokens, sampling, seeds=[seed], stop=stop):
        if (token := int(step.tokens[0])) not in stop:
            print(stream.push(token), end="", flush=True)
    print(stream.finish())


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from None


@app.command()
def verify(
    model: Annotated[str, typer.Option(help=_MODEL)] = "smollm2",
    mesh_sizes: Annotated[str, typer.Option(help="Tensor-parallel sizes to compare.")] = "1,2,3,4,5,6,7,8",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to compare.")] = "1,3,8",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, or both.")] = "float32",
    numerics: Annotated[str, typer.Option(help="plain, invariant, or both.")] = "plain,invariant",
    new_tokens: Annotated[int, typer.Option(help="Generated per prompt, greedily.")] = 64,
    prompts: Annotated[int, typer.Option(help="How many of the built-in prompts (8).")] = 8,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file instead, one prompt a line.")] = None,
    leaves: Annotated[int, typer.Option(help="Contract: the largest mesh ever to be used.")] = 8,
    tree: Annotated[str, typer.Option(help="Contract: arities of the tree, from the leaves up.")] = "2",
    emulate: Annotated[
        bool | None,
        typer.Option(
            help="Run meshes that are larger than the number of devices on one of them, rank after rank. Default: on GPUs.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here, too.")] = None,
) -> None:
    """Run the same prompts on every mesh and in every batch, and compare all bits.

    Exit status 1 if the invariant side differs anywhere.
    """
    meshes, batches = _sizes(mesh_sizes, "--mesh-sizes"), _sizes(batch_sizes, "--batch-sizes")
    _arrange_devices(1 if emulate else max(meshes))
    import jax

    from tbik_jax import verify as experiment
    from tbik_jax.models.open import open_model

    contract = _contract(leaves, tree)
    kinds = _names(numerics, ("plain", "invariant"), "--numerics")
    widths = _names(dtypes, ("float32", "bfloat16"), "--dtypes")
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: there is no folder {json_file.parent}")
    texts = list(experiment.PROMPTS[:prompts]) if prompts_file is None else _read_prompts(prompts_file)
    opened = open_model(model)
    with _bar("starting") as update:
        report = experiment.verify(
            opened,
            mesh_sizes=meshes,
            batch_sizes=batches,
            dtypes=widths,
            kinds=kinds,
            prompts=texts,
            new_tokens=new_tokens,
            contract=contract,
            emulate=jax.default_backend() == "gpu" if emulate is None else emulate,
            progress=lambda text, done, total: update(done, total, text),
        )
    _show(report, meshes, batches)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if not report.holds:
        raise typer.Exit(1)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file {path}: {error}") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise ValueError(f"--prompts-file {path} has no prompts; write one a line")
    return found


def _show(report: Any, meshes: list[int], batches: list[int]) -> None:
    configurations = len(meshes) * len(batches)
    emulated = sorted({c.tp for side in report.sides for c in side.configurations if c.emulated})
    note = f" ({', '.join(map(str, emulated))} emulated on one device)" if emulated else ""
    table = Table(
        title=f"{report.model}: {len(report.prompts)} prompts, {report.new_tokens} new tokens, greedy; "
        f"{configurations} configurations\nmesh sizes {', '.join(map(str, meshes))}{note}  x  batch sizes "
        f"{', '.join(map(str, batches))}",
        caption="texts: different answers per prompt; digests: different SHA-256 of all logits;\n"
        "Δp: how far a top-5 probability moves, mean over positions and largest\n"
        f"jax {report.environment['jax']}, {report.environment['device']}; contract: {report.contract.leaves} leaves, "
        f"tree {report.contract.tree}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("numerics", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for name in ("texts", "digests", "mean Δp", "max Δp"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("prefill\n= decode", "batch\n= alone"):
        table.add_column(name, justify="center", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    for side in report.sides:
        style = "" if side.numerics == "plain" else "bold green" if side.is_invariant else "bold red"
        table.add_row(
            side.numerics,
            {"float32": "f32", "bfloat16": "bf16"}[side.dtype],
            f"{side.unique_outputs:.2f}",
            str(side.logit_digests),
            f"{side.mean_divergence:.1e}" if side.mean_divergence else "0",
            f"{side.max_divergence:.1e}" if side.max_divergence else "0",
            _mark(side.prefill_is_decode),
            _mark(side.batch_is_alone),
            f"{sum(c.seconds for c in side.configurations):.0f}",
            style=style,
        )
    out.print(table)
    invariant = [side for side in report.sides if side.numerics == "invariant"]
    if invariant and report.holds:
        out.print(
            "[bold green]Every configuration gave the same bits.[/] SHA-256 of all logits: "
            + ", ".join(f"{side.dtype} {_short(side)}" for side in invariant)
        )
    elif invariant:
        out.print("[bold red]The invariant side differs between configurations. This is a bug: please report it.[/]")


def _mark(same: bool | None) -> str:
    return "-" if same is None else "yes" if same else "no"


def _short(side: Any) -> str:
    import hashlib

    return hashlib.sha256("".join(side.configurations[0].digests).encode()).hexdigest()[:16]


@app.command()
def bench(
    suites: Annotated[str, typer.Option(help="large, small, weight-gradient, input-gradient, or all.")] = "large,small",
    model: Annotated[
        str | None, typer.Option(help="Names from the catalogue; default: those that fit the device.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16, float32; default: bfloat16 on GPUs.")] = None,
    tree: Annotated[str, typer.Option(help="balanced, chain, or both.")] = "balanced,chain",
    baseline: Annotated[str, typer.Option(help="On GPUs: cublas, or what xla chooses (compiles slowly).")] = "cublas",
    repeat: Annotated[int | None, typer.Option(min=1, help="Runs per row; default: 10, or 20 for small.")] = None,
    limit_seconds: Annotated[float | None, typer.Option(help="Begin no further row after so long.")] = None,
    output: Annotated[Path | None, typer.Option(help="Append rows to this file, one JSON object a line.")] = None,
) -> None:
    """Measure matrix products of known models on this device, against jnp.dot, and compare their bits to the tree's.

    The small suite takes the first tree only. Exit status 1 if a row fails or has other bits.
    """
    from tbik_jax import bench as benchmark
    from tbik_jax.shapes import MODELS

    chosen = list(benchmark.SUITES) if suites == "all" else _names(suites, benchmark.SUITES, "--suites")
    trees = _names(tree, benchmark.TREES, "--tree")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")
    device = benchmark.device(_names(baseline, benchmark.BASELINES, "--baseline")[0])
    models = _names(model, tuple(MODELS), "--model") if model else list(benchmark.default_models(device.backend))
    width = _names(dtype or ("float32" if device.backend == "cpu" else "bfloat16"), benchmark.DTYPES, "--dtype")[0]
    cases = benchmark.cases(chosen, models, trees, backend=device.backend)
    about = f"{device.name}; baseline {device.baseline}; timer: {device.timer}; {width}"
    err.print(f"{len(cases)} rows on {about}", highlight=False, markup=False)
    rows: list[dict[str, Any]] = []
    try:
        with _bar("compiling") as update:
            measured = benchmark.measure(
                cases, device, dtype=width, repeat=repeat, limit_seconds=limit_seconds, progress=update
            )
            for row in measured:
                rows.append(row)
                if output is not None:
                    with output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    finally:
        if rows:
            _show_rows(rows, about)
            _show_summaries(benchmark.summaries(rows))
    if len(rows) < len(cases):
        out.print(f"[yellow]{len(rows)} of {len(cases)} rows: --limit-seconds {limit_seconds:g} is over.[/]")
    if any("error" in row or row["bits"] != "equal" for row in rows):
        raise typer.Exit(1)


def _show_rows(rows: list[dict[str, Any]], about: str) -> None:
    table = Table(title=about, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("suite", "model", "product"):
        table.add_column(name, no_wrap=True)
    for name in ("tp", "m", "n", "k", "leaves"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tree", no_wrap=True)
    for name in ("ours\nµs", "baseline\nµs", "TFLOP/s", "GB/s", "ratio", "bits"):
        table.add_column(name, justify="right", no_wrap=name != "bits")
    for row in rows:
        tree = row["tree"] if row["leaves"] > 2 else "-"
        what = [
            row["suite"],
            row["model"],
            row["product"],
            *(str(row[key]) for key in ("tp", "m", "n", "k", "leaves")),
            tree,
        ]
        if "error" in row:
            table.add_row(*what, *["-"] * 5, "failed", style="bold red")
            continue
        speed = "tflops" if row["tokens"] > 128 else "gbs"
        table.add_row(
            *what,
            f"{row['ours_us']:.1f}",
            f"{row['baseline_us']:.1f}",
            f"{row['ours_tflops']:.1f}" if speed == "tflops" else "",
            f"{row['ours_gbs']:.0f}" if speed == "gbs" else "",
            f"{row['ratio']:.3f}",
            "equal" if row["bits"] == "equal" else f"{100 * row['bits']:.3g}% differ",
            style="" if row["bits"] == "equal" else "bold red",
        )
    out.print(table)
    for row in rows:
        if "error" in row:
            where = f"{row['suite']} {row['model']} {row['product']} tp{row['tp']} m={row['m']}"
            out.print(f"{where}: {row['error']}", style="red", highlight=False, markup=False)


def _show_summaries(summaries: list[Any]) -> None:
    table = Table(
        title="baseline time / our time; 1 is equal, more is faster",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("suite", no_wrap=True)
    for name in ("tokens", "rows", "geometric mean", "smallest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where")
    table.add_column("bits", no_wrap=True)
    for each in summaries:
        table.add_row(
            each.suite,
            "all" if each.tokens is None else str(each.tokens),
            str(each.rows),
            f"{each.geometric_mean:.3f}",
            f"{each.smallest:.3f}",
            each.worst,
            "all equal" if each.bits_equal == each.rows else f"{each.rows - each.bits_equal} rows differ",
            style="bold" if each.tokens is None else "",
        )
    out.print(table)


@app.command()
def info(
    contract_leaves: Annotated[int, typer.Option("--leaves", help="Of the contract to describe.")] = 8,
    tree: Annotated[str, typer.Option(help="Arities of its tree.")] = "2",
) -> None:
    """Versions, devices, the contract, and what is supported here and why not."""
    import importlib.metadata as metadata

    import jax

    from tbik_jax.kernels import backend
    from tbik_jax.kernels.matmul import SelfTestError, cpu

    contract = _contract(contract_leaves, tree)
    table = Table(show_header=False, box=None, pad_edge=False)
    for package in ("tbik-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"):
        table.add_row(package, metadata.version(package))
    table.add_row("devices", ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()))
    table.add_row("contract", f"version {contract.version}, {contract.leaves} leaves, KV blocks of {contract.kv_block}")
    table.add_row("tree", str(contract.tree_over(contract.leaves)))
    try:
        family = backend.family()
        if family == "cpu":
            cpu.self_test()
        table.add_row(
            "invariant numerics",
            f"supported: family {family!r}" + "; the products passed their self-test" * (family == "cpu"),
        )
    except (NotImplementedError, SelfTestError) as error:
        table.add_row("invariant numerics", f"not supported here: {error}")
    try:
        from tbik_jax.models.smollm2 import find_smollm2

        table.add_row("SmolLM2 weights", f"installed: {find_smollm2().name}")
    except ValueError as error:
        table.add_row("SmolLM2 weights", str(error))
    out.print(table, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
