"""Export a spec's package as a repository for Hugging Face's `kernels` library: one build for all GPUs, and a card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_gen import __version__
from nsa_gen._files import read_json, read_text, write_all
from nsa_gen._resources import tuned_dir
from nsa_gen.rendering.package import RefusedOverwriteError, generate, render
from nsa_gen.spec import Spec

VARIANT = "build/torch-universal"
"""Where the library looks for a build that needs only PyTorch and Triton, for all versions and devices."""
MARK = "<!-- Written by nsa-gen export hub; edits are lost when it is exported again. -->"
LICENSE = "Apache-2.0"


def export_hub(
    spec: Spec, folder: Path, *, report: Path | None = None, tuned: Path | None = None, version: int = 1
) -> Path:
    """Write the repository of a spec's kernels into ``folder/<name>`` and return that folder.

    The package is in ``build/torch-universal/<name>/``, with its tuned tables. The library imports it under the id in
    its metadata, which is the name and a digest of every file. The id is also the namespace of its operators, so two
    versions can run in one process. Files of an earlier export are replaced. Files that others wrote are never touched.

    Args:
        spec: the spec.
        folder: the parent folder of repositories.
        report: the output of `nsa-gen verify SPEC --json`, for the card.
        tuned: a folder of tuned tables; if None, those shipped for a spec of this name.
        version: the kernel's version on the hub.

    Raises:
        ValueError: the report is of another spec, is not a report, or has failures; or a table is not JSON.
        RefusedOverwriteError: nsa_gen did not write a file that it would replace.
        OSError: a file cannot be read or written.
    """
    checked = None if report is None else _checked_report(spec, report)
    tables = _tables(spec, tuned)
    home = folder / spec.name
    variant = home / VARIANT
    card = home / "README.md"
    if card.exists() and MARK not in read_text(card):
        raise RefusedOverwriteError(f"{card}: not written by nsa_gen, so it is not replaced; move it")
    package = generate(spec, variant)
    metadata = {
        "id": f"{spec.name}_{_digest({**render(spec), **tables})}",
        "name": spec.name.replace("_", "-"),
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    texts = {package / "tuned" / name: text for name, text in tables.items()}
    stale = [path for path in sorted((package / "tuned").glob("*.json")) if path not in texts]
    texts[variant / "metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    texts[card] = _card(spec, metadata["id"], version, tables, checked)
    write_all(texts, remove=stale)
    return home


def _checked_report(spec: Spec, path: Path) -> Mapping[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or not {"ok", "name", "digest", "rows", "environment"} <= found.keys():
        raise ValueError(f"{path}: expected what nsa-gen verify {spec.name} --json prints, got other JSON")
    if (found["name"], found["digest"]) != (spec.name, spec.digest()):
        raise ValueError(
            f"{path}: expected a report of {spec.name} ({spec.digest()}), got one of {found['name']} "
            f"({found['digest']}); verify the spec that is exported"
        )
    if found["ok"] is not True:
        raise ValueError(f"{path}: expected a report without failures; these kernels are not to be published")
    return found


def _tables(spec: Spec, tuned: Path | None) -> dict[str, str]:
    """Texts of tuned tables by file name."""
    folder = tuned_dir(spec.name) if tuned is None else tuned
    if folder is None:
        return {}
    if not folder.is_dir():
        raise NotADirectoryError(20, "expected a folder of tuned tables", str(folder))
    found = {path.name: read_text(path) for path in sorted(folder.glob("*.json"))}
    if tuned is not None and not found:
        raise ValueError(f"{folder}: expected tuned tables (*.json), got none")
    for name, text in found.items():
        try:
            json.loads(text)
        except ValueError as error:
            raise ValueError(f"{folder / name}: expected JSON: {error}") from None
    return found


def _digest(texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def _card(spec: Spec, identity: str, version: int, tables: Mapping[str, str], report: Mapping[str, Any] | None) -> str:
    shown = spec.description or "Native sparse attention"
    tuned = ", ".join(tables) if tables else "none; tiles are those of the cost model"
    return f"""\
---
library_name: kernels
license: {LICENSE.lower()}
tags: [kernels, triton, sparse-attention]
---

{MARK}

# {spec.name}

{shown}. Native sparse attention (arXiv 2502.11089), generated by nsa_gen {__version__} for {spec.heads.query} query
heads on {spec.heads.kv} KV heads, head dims {spec.head_dim.qk} and {spec.head_dim.v}, {spec.dtype}; Triton kernels for
{", ".join(spec.passes)}.

```python
from kernels import get_kernel

{spec.name} = get_kernel("OWNER/{spec.name}", version={version})
help({spec.name}.nsa_attention)
print({spec.name}.explain())
```

The operators' namespace is `{identity}`. Tuned tables: {tuned}.

## Verification

{_verification(report, spec)}

## Spec

```yaml
{spec.resolved_yaml().strip()}
```
"""


def _verification(report: Mapping[str, Any] | None, spec: Spec) -> str:
    if report is None:
        return f"No report came with this export. Verify it: `nsa-gen verify {spec.name}`."
    environment = report["environment"]
    worst: dict[str, Mapping[str, Any]] = {}
    for row in report["rows"]:
        known = worst.get(row["quantity"])
        if known is None or _usage(row) > _usage(known):
            worst[row["quantity"]] = row
    lines = [
        f"Every quantity is within its bound of a dense float64 reference, in {len(report['rows'])} comparisons of "
        f"{len(report.get('cases', ()))} calls ({report.get('dtype')}), on "
        f"{environment.get('gpu') or environment.get('device')} with torch {environment.get('torch')} and triton "
        f"{environment.get('triton')}. The worst of each:",
        "",
        "| quantity | measure | error | bound | call |",
        "| --- | --- | --: | --: | --- |",
    ]
    for name, row in worst.items():
        lines.append(f"| {name} | {row['measure']} | {row['error']:.2e} | {row['bound']:.2e} | {row['case']} |")
    return "\n".join(lines)


def _usage(row: Mapping[str, Any]) -> float:
    return row["error"] / row["bound"] if row["bound"] else 0.0
