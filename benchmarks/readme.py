"""Write the README's tables from committed rows, so that every number in it was measured.

python benchmarks/readme.py            # rewrite README.md
python benchmarks/readme.py --check    # fail if it is not what the rows say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = HERE / "rows"
README = HERE.parent / "README.md"


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


def written(text: str) -> str:
    for name, table in (("verified", verified()), ("cost", cost())):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, table=table: m[1] + table + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}; it needs one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = README.read_text(encoding="utf-8")
    new = written(text)
    if parser.parse_args().check:
        sys.exit("README.md differs from the rows: run python benchmarks/readme.py" if new != text else 0)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
