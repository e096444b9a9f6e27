"""Write the tables of README.md and docs/hopper.md from committed rows, so that every number in them was measured.

python benchmarks/readme.py            # rewrite them
python benchmarks/readme.py --check    # fail if they are not what the rows say

Rows of Hopper GPUs are those of `tbik-jax bench --output`, and of hopper_stages.py and hopper_attention.py. Without any of the
first there is neither a section on Hopper nor its page.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = HERE / "rows"
README = HERE.parent / "README.md"
HOPPER_ROWS = ROWS / "hopper_matmul.jsonl"
STAGE_ROWS = ROWS / "hopper_stages.jsonl"
ATTENTION_ROWS = ROWS / "hopper_attention.jsonl"
HOPPER_PAGE = HERE.parent / "docs" / "hopper.md"


def cost() -> str:
    """Invariant time over plain time, the newest row of every (JAX version, dtype, work)."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in (ROWS / "cpu_model.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["jax"], row["dtype"], row["work"]] = row
    works = list(dict.fromkeys(work for _, _, work in rows))
    lines = ["| invariant / plain | " + " | ".join(works) + " |", "|---|" + "---|" * len(works)]
    for jax_version, dtype in dict.fromkeys((v, d) for v, d, _ in rows):
        cells = []
        for work in works:
            row = rows.get((jax_version, dtype, work))
            cells.append("-" if row is None else f"{row['ratio']:.2f} ({row['invariant_ms']:.0f} ms)")
        lines.append(f"| {dtype}, jax {jax_version} | " + " | ".join(cells) + " |")
    devices = sorted({row["device"] for row in rows.values()})
    return "\n".join([*lines, "", f"Device: {'; '.join(devices)}."])


def verified() -> str:
    """The table of the committed `verify` reports on SmolLM2."""
    lines = []
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROWS.glob("verify_smollm2*.json"))]
    for report in reports:
        first = report["sides"][0]["configurations"]
        sizes = [", ".join(str(n) for n in dict.fromkeys(c[key] for c in first)) for key in ("tp", "batch")]
        if not lines:
            lines += [
                f"SmolLM2-135M-Instruct, {len(report['prompts'])} prompts, {report['new_tokens']} new tokens, greedy",
                f"mesh sizes {sizes[0]}  x  batch sizes {sizes[1]}",
                "",
                "numerics   dtype                texts  logit digests  mean Δp    max Δp     prefill = decode  batch = alone",
            ]
        for side in report["sides"]:
            deltas = [f"{side[key]:.1e}" if side[key] else "0" for key in ("mean_divergence", "max_divergence")]
            lines.append(
                f"{side['numerics']:<10} {side['dtype']:<9} {side['unique_outputs']:>16.2f}  {side['logit_digests']:>13}  "
                f"{deltas[0]:<9}  {deltas[1]:<9}  {_mark(side['prefill_is_decode']):<16}  {_mark(side['batch_is_alone'])}"
            )
    return "\n".join(["```text", *lines, "```"])


def _mark(same: bool | None) -> str:
    return "-" if same is None else "yes" if same else "no"


def gpu(row: dict[str, Any]) -> str:
    """The name of a row's device, short: H100."""
    found = re.search(r"\b[A-Z]+\d+\w*", row["device"])
    return found[0] if found else row["device"]


def whole_model() -> str:
    """Invariant time over plain time: of every work, GPU and numerics the newest row that has them."""
    rows = [json.loads(line) for line in (ROWS / "hopper_model.jsonl").read_text(encoding="utf-8").splitlines()]
    sides = {"chain": "`tree=(8,)`", "balanced": "`tree=(2,)`"}
    lines = [f"| work | GPU | plain | {' | '.join(sides.values())} |", "|---|---|---|---|---|"]
    used = []
    of_each: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        of_each.setdefault((row["work"], gpu(row)), []).append(row)
    works = [work for work, _ in of_each]
    for (work, name), some in sorted(of_each.items(), key=lambda item: works.index(item[0][0])):
        newest = {side: row for row in some for side in sides if f"{side}_ms" in row}
        used += newest.values()
        cells = [f"{next(newest[side] for side in sides if side in newest)['plain_ms']:.1f} ms"]
        for side in sides:
            row = newest.get(side, {})
            milliseconds = row.get(f"{side}_ms")
            cells.append(f"{milliseconds / row['plain_ms']:.2f} ({milliseconds:.1f} ms)" if milliseconds else "-")
        lines.append(f"| {work} | {name} | {' | '.join(cells)} |")
    layers = dict.fromkeys(f"{row['layers']} layers, {row['dtype']}" for row in used)
    return "\n".join([*lines, "", f"{used[0]['model']}, {'; '.join(layers)}. {_devices(used)}."])


def digests() -> str:
    """How many digests the ways to run a model gave on a GPU, in its newest rows."""
    rows = [json.loads(line) for line in (ROWS / "hopper_bits.jsonl").read_text(encoding="utf-8").splitlines()]
    newest = {(row["model"], row["numerics"]): row for row in rows}
    names = {"qwen3": "Qwen3-8B's sizes, 2 layers, random weights", "smollm2": "SmolLM2-135M, its weights"}
    lines = ["| model | numerics | ways | logits of all positions | continuations |", "|---|---|---|---|---|"]
    for (model, numerics), row in newest.items():
        counts = (f"{row[f'digests_of_{kind}']} digests" for kind in ("all_positions", "continuations"))
        cells = [
            names[model],
            numerics,
            str(len(row["ways"])),
            *(text.replace("1 digests", "1 digest") for text in counts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{rows[-1]['dtype']}; {_devices(list(newest.values()))}."])


def several_gpus() -> str:
    """Times over plain ones on several GPUs, of collectives over psum, and whether bits were equal; from the newest rows."""
    rows = [json.loads(line) for line in (ROWS / "multi_gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = [row for row in rows if row["processes"] == 1]
    models = {(r["work"], r["tp"], r["numerics"]): r for r in timed if r["section"] == "model"}
    lines = ["| work | GPUs | numerics | invariant / plain |", "|---|---|---|---|"]
    lines += [
        f"| {work} | {tp} | {numerics} | {row['over_plain']:.2f} ({row['ms']:.1f} ms) |"
        for (work, tp, numerics), row in models.items()
        if numerics != "plain"
    ]
    collectives = {
        (r["collective"], r["ranks"], r["kibibytes"], r["algorithm"]): r
        for r in timed
        if r["section"] == "collectives" and "over_psum" in r
    }
    sizes = sorted({kibibytes for _, _, kibibytes, _ in collectives})
    lines += ["", f"| time over JAX's own, f32 | {' | '.join(map(_bytes, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
    names = {"sum": "`tree_psum`", "scatter": "`tree_psum_scatter`"}
    for kind, name in names.items():
        for algorithm in ("auto", "direct"):
            cells = [f"{collectives[kind, 2, size, algorithm]['over_psum']:.2f}" for size in sizes]
            lines.append(f"| {name}, `{algorithm}` | {' | '.join(cells)} |")
    compared = [row["bits"] for row in rows if "bits" in row]
    apart = sum("bits" in row for row in rows if row["processes"] > 1)
    newest = [*models.values(), *collectives.values()]
    equal = "all equal" if set(compared) == {"equal"} else "NOT all equal"
    return "\n".join(
        [*lines, "", f"{len(compared)} comparisons of bits ({apart} over two processes), {equal}. {_devices(newest)}."]
    )


def _bytes(kibibytes: int) -> str:
    return f"{kibibytes} KiB" if kibibytes < 1024 else f"{kibibytes // 1024} MiB"


def hopper_rows(path: Path) -> list[dict[str, Any]]:
    """The newest row of everything that was measured on every device; none if there is no such file."""
    if not path.exists():
        return []
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    identity = ("device", "dtype", "suite", "model", "product", "tp", "m", "n", "k", "leaves", "tree")
    identity += ("stage", "shape", "batch", "keys", "heads", "kv_heads", "head_dim")
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "error" in row:
            raise SystemExit(f"{path.name} has a row that failed: {line[:200]}")
        rows[tuple(str(row.get(key)) for key in identity)] = row
    # What was measured on several devices stands together.
    order = {key: place for place, key in reversed(list(enumerate(key[1:] for key in rows)))}
    return [row for key, row in sorted(rows.items(), key=lambda item: order[item[0][1:]])]


def hopper(rows: list[dict[str, Any]]) -> str:
    """The baseline's time over ours, by what is multiplied and by GPU: geometric mean, smallest, number of rows."""
    devices = sorted({gpu(row) for row in rows})
    lines = [f"| products | tokens | leaves | {' | '.join(devices)} | bits |", "|---" * (4 + len(devices)) + "|"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        leaves = "1" if row["leaves"] == 1 else "more, chain" if row["tree"] == "chain" else "more, balanced"
        if row["suite"] == "small":
            leaves = "all"
        groups.setdefault((row["suite"], row["dtype"], row["tokens"], leaves), []).append(row)
    names = {"large": "many tokens", "small": "few tokens", "weight-gradient": "weight gradient"}
    for (suite, dtype, tokens, leaves), some in sorted(groups.items()):
        cells = [f"{names.get(suite, suite.replace('-', ' '))}, {dtype}", str(tokens), leaves]
        for device in devices:
            ratios = [row["ratio"] for row in some if gpu(row) == device]
            if not ratios:
                cells.append("-")
                continue
            mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
            cells.append(f"{mean:.2f}, {min(ratios):.2f} ({len(ratios)})")
        equal = sum(row["bits"] == "equal" for row in some)
        cells.append("all equal" if equal == len(some) else f"{len(some) - equal} rows differ")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _measured_on(rows)])


def _devices(rows: Sequence[dict[str, Any]]) -> str:
    """Each device once, with the versions and commits of its rows."""
    commits: dict[str, list[str]] = {}
    for row in rows:
        cuda = f", CUDA {row['cuda']}" if row.get("cuda") else ""
        commits.setdefault(f"{row['device']}, jax {row['jax']}{cuda}", []).append(row["commit"])
    found = {device: list(dict.fromkeys(some)) for device, some in commits.items()}
    return "; ".join(
        f"{device}, {'commit' if len(some) == 1 else 'commits'} {' '.join(some)}" for device, some in found.items()
    )


def _measured_on(rows: Sequence[dict[str, Any]]) -> str:
    baselines = ", ".join(sorted({row["baseline"] for row in rows}))
    return f"Baseline: {baselines}. Measured on {_devices(rows)}."


def hopper_section(rows: list[dict[str, Any]]) -> str:
    models = sorted({row["model"] for row in rows})
    return (
        "## On Hopper\n\n"
        f"Matrix products of {', '.join(models)} against the vendor's library, in the time that the kernels take (1.00 is "
        "equal,\nmore is faster): geometric mean, smallest, number of products. *bits*: every value equals the\n"
        "canonical tree over the leaves' own products. All rows: [docs/hopper.md](docs/hopper.md); on your own device:\n"
        "`tbik-jax bench`.\n\n"
        f"<!-- hopper -->\n{hopper(rows)}\n<!-- /hopper -->\n\n"
    )


def hopper_page(
    rows: list[dict[str, Any]], of_stages: Sequence[dict[str, Any]] = (), of_attention: Sequence[dict[str, Any]] = ()
) -> str:
    """Every row, as a page of its own."""
    lines = [
        "# Measured on Hopper",
        "",
        "Written by `python benchmarks/readme.py` from `benchmarks/rows/hopper_*.jsonl`. Times are medians in microseconds of",
        "what the kernels take, with their quartiles (rows without come from forerunners of the scripts named here); *ratio*",
        "is the baseline's time over ours (1.00 is equal, more is faster).",
        *(stages(of_stages) if of_stages else ()),
        *(attention(of_attention) if of_attention else ()),
        "",
        "## Matrix products",
        "",
        "From `tbik-jax bench`. Products of few tokens are measured over so many copies of their operands that weights",
        "come from memory.",
        "",
        _measured_on(rows),
    ]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        lines += [
            "",
            f"### {suite}",
            "",
            "| model | product | tp | m | n | k | leaves | tree | dtype | GPU | ours | baseline | ratio | TFLOP/s | GB/s |"
            " bits |",
            "|---" * 16 + "|",
        ]
        for row in (row for row in rows if row["suite"] == suite):
            what = [str(row[key]) for key in ("model", "product", "tp", "m", "n", "k", "leaves", "tree", "dtype")]
            what.append(gpu(row))
            bits = row["bits"] if row["bits"] == "equal" else f"{100 * row['bits']:.3g}% differ"
            speeds = [f"{row['ratio']:.3f}", f"{row['ours_tflops']:.1f}", f"{row['ours_gbs']:.0f}", bits]
            lines.append(f"| {' | '.join([*what, *_times(row), *speeds])} |")
    return "\n".join(lines) + "\n"


def stages(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Stages between the products",
        "",
        "From `benchmarks/hopper_stages.py`. *of copy*: bandwidth over that of a copy, ours and the baseline's, where the",
        "operands are more than the L2 cache holds; bytes are those of operands and results, each once.",
        "",
        _measured_on(rows),
        "",
        "| stage | pass | operand | dtype | GPU | ours | baseline | ratio | of copy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = [row["stage"], row["suite"], " x ".join(map(str, row["shape"])), row["dtype"], gpu(row)]
        cells = [*what, *_times(row), f"{row['ratio']:.2f}", _of_copy(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def attention(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Attention",
        "",
        "From `benchmarks/hopper_attention.py`; causal. *of copy*: the bandwidth at which keys and values are read, over",
        "that of a copy.",
        "",
        _measured_on(rows),
        "",
        "| what | batch | keys | heads | dtype | GPU | ours | baseline | ratio | TFLOP/s | of copy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        heads = f"{row['heads']} / {row['kv_heads']} of {row['head_dim']}"
        what = [row["suite"], str(row["batch"]), str(row["keys"]), heads, row["dtype"], gpu(row)]
        speed = f"{row['ours_tflops']:.0f}" if "ours_tflops" in row else "-"
        cells = [*what, *_times(row), f"{row['ratio']:.3f}", speed, _of_copy(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _times(row: dict[str, Any]) -> list[str]:
    """Ours and the baseline's."""
    found = []
    for side in ("ours", "baseline"):
        low, high = row.get(f"{side}_spread_us", (None, None))
        spread = "" if low is None else f" ({low:.1f} to {high:.1f})"
        found.append(f"{row[f'{side}_us']:.1f}{spread}")
    return found


def _of_copy(row: dict[str, Any]) -> str:
    return f"{row['of_copy']:.2f}, {row['baseline_of_copy']:.2f}" if "of_copy" in row else "-"


def written(text: str, hopper_from: Path = HOPPER_ROWS) -> str:
    """README.md with the tables that the rows give."""
    tables = {
        "verified": verified(),
        "cost": cost(),
        "model": whole_model(),
        "digests": digests(),
        "several": several_gpus(),
    }
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, table=table: m[1] + table + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}; it needs one")
    return _with_hopper(text, hopper_rows(hopper_from))


def _with_hopper(text: str, rows: list[dict[str, Any]]) -> str:
    """Its table where the section is, the section before the limits where there is none, or nothing without rows."""
    found = re.search(r"(<!-- hopper -->\n).*?(\n<!-- /hopper -->)", text, flags=re.DOTALL)
    if found and rows:
        return text[: found.start()] + found[1] + hopper(rows) + found[2] + text[found.end() :]
    if found:
        raise SystemExit(f"README.md has a table on Hopper, and there is no {HOPPER_ROWS.name} to write it from")
    if not rows:
        return text
    if text.count("\n## Limits\n") != 1:
        raise SystemExit("README.md has no section 'Limits' for the section on Hopper to stand before")
    before, after = text.split("\n## Limits\n")
    return f"{before}\n{hopper_section(rows)}## Limits\n{after}"


def pages() -> dict[Path, str]:
    """Every file that rows are written to, and its text."""
    found = {README: written(README.read_text(encoding="utf-8"))}
    rows = hopper_rows(HOPPER_ROWS)
    if rows:
        found[HOPPER_PAGE] = hopper_page(rows, hopper_rows(STAGE_ROWS), hopper_rows(ATTENTION_ROWS))
    elif HOPPER_PAGE.exists():
        raise SystemExit(f"docs/{HOPPER_PAGE.name} has no {HOPPER_ROWS.name} that it could come from")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in pages().items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} differs from the rows: run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
