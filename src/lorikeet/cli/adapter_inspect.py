"""`lorikeet adapter inspect`: what an adapter does to which modules, and how it was made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet import console
from lorikeet.cli.options import add_json
from lorikeet.errors import ConfigError

if TYPE_CHECKING:
    from lorikeet.adapters import AdapterInfo
    from lorikeet.adapters.anatomy import Anatomy, Group

_WIDEST = 8  # kinds of modules that stand beside each other in the table of blocks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("folder", metavar="DIR", help="adapter folder, or a run folder with one")
    parser.add_argument(
        "--model", metavar="FOLDER", help="base model folder: norms relative to its weights"
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw a heat map (.png or .svg)")
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="modules that are listed (default: 10)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Examine the adapter; print what was found."""
    if args.top < 0:
        raise ConfigError(f"--top is {args.top}; expected 0 or more modules")
    from lorikeet.adapters import read_adapter, read_adapter_config
    from lorikeet.adapters.anatomy import examine
    from lorikeet.cli.subject import adapter_folder

    plot = Path(args.plot) if args.plot else None
    if plot:
        from lorikeet.study.plots import plot_anatomy, require_plots

        require_plots(plot)
    folder = adapter_folder(args.folder)
    assert folder is not None
    info = read_adapter_config(folder)
    anatomy = examine(read_adapter(folder), _weights(args.model))
    if plot:
        plot_anatomy(anatomy, plot, title=_plain(Path(args.folder).resolve().name))
        console.note(f"drawn: {plot}")
    size = _file_size(folder)
    if args.json:
        console.out.print_json(json.dumps(_found(folder, info, anatomy, size, args.top)))
        return 0
    _print_origin(folder, info, anatomy, size)
    _print_modules(anatomy, args.top)
    _print_blocks(anatomy)
    console.out.print("\nfindings" if anatomy.findings else "\nfindings: none", style="bold")
    for finding in anatomy.findings:
        console.out.print(f"  - {_plain(finding)}", markup=False)
    return 0


def _weights(model: str | None) -> Any:
    if model is None:
        return None
    from lorikeet.adapters.base_weights import BaseWeights

    return BaseWeights(Path(model))


def _file_size(folder: Path) -> int:
    """Bytes of the file that holds the tensors."""
    from lorikeet.adapters.files import PICKLE_FILE, TENSORS_FILE

    files = (folder / TENSORS_FILE, folder / PICKLE_FILE)
    return next(file.stat().st_size for file in files if file.exists())


def _found(
    folder: Path, info: AdapterInfo, anatomy: Anatomy, size: int, top: int
) -> dict[str, Any]:
    found = anatomy.summary()
    return {
        "folder": str(folder),
        "base_model": info.base_model,
        "config": info.config.model_dump(),
        "made_by": info.provenance or None,
        "file_bytes": size,
        **found,
        "modules": found["modules"][:top],
        "module_count": len(found["modules"]),
    }


def _print_origin(folder: Path, info: AdapterInfo, anatomy: Anatomy, size: int) -> None:
    config, made_by = info.config, info.provenance
    kinds = ", ".join(f"{kind} ({group.modules})" for kind, group in anatomy.by_kind().items())
    kinds_of_lora = (
        ("others by alpha_pattern", bool(config.alpha_pattern)),
        ("rsLoRA", config.rslora),
        ("DoRA", config.dora),
    )
    extras = [name for name, on in kinds_of_lora if on]
    rows = [
        ["adapts", f"{len(anatomy.modules)} modules: {kinds}"],
        ["rank", _span(anatomy.ranks)],
        ["alpha", ", ".join([f"{config.alpha:g}", *extras])],
        ["scale", _span(anatomy.scales)],
        ["parameters", f"{anatomy.total.parameters:,}"],
        ["file", f"{size:,} bytes"],
        ["base model", info.base_model or "not said"],
        ["fingerprint", made_by.get("base_fingerprint", "not said")],
    ]
    if made_by:
        shown = {"template": "template", "data_sha256": "data sha256", "seed": "seed"}
        rows += [[name, made_by[key]] for key, name in shown.items() if key in made_by]
        versions = made_by.get("versions")
        if isinstance(versions, Mapping):
            rows.append(["versions", ", ".join(f"{k} {v}" for k, v in versions.items())])
    else:
        rows.append(["made by", "another tool, which left no record"])
    console.out.print(str(folder), style="bold", markup=False)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.out.print(f"  {name:{width}}  {_plain(value)}", markup=False)


def _print_modules(anatomy: Anatomy, top: int) -> None:
    most = anatomy.most_moved()[:top]
    if not most:
        return
    unit = "% of ‖W‖" if anatomy.weighed else "rms"
    scaled = any(m.magnitude for m in most)
    rows = [
        [
            m.name,
            _moved(anatomy, m),
            f"{m.norm:.4g}",
            f"{m.spectral_norm:.4g}",
            f"{m.effective_rank:.1f} of {m.r}",
            "n/a" if m.first_half is None else f"{100 * m.first_half:.0f} %",
            f"{m.a_norm:.3g}",
            f"{m.b_norm:.3g}",
            *([_range(m.magnitude)] if scaled else []),
        ]
        for m in most
    ]
    columns = ["moved most", unit, "‖update‖", "spectral", "eff. rank", "energy", "‖A‖", "‖B‖"]
    if scaled:
        columns.append("magnitude")
    _table(columns, rows)
    legend = ["energy: share of ‖update‖² in the larger half of the singular values"]
    if not anatomy.weighed:
        legend.append("rms: root mean square of the update's entries; --model gives shares of ‖W‖")
    for line in legend:
        console.out.print(f"  {line}", style="dim", markup=False)


def _print_blocks(anatomy: Anatomy) -> None:
    """Blocks by kinds: how far each was moved; the margins take a row or a column together."""
    by_kind, by_layer, cells = anatomy.by_kind(), anatomy.by_layer(), anatomy.cells()
    kinds = list(by_kind) if len(by_kind) <= _WIDEST else []
    rows = [
        [
            "other" if layer is None else layer,
            *(_cell(anatomy, cells.get((layer, kind))) for kind in kinds),
            _moved(anatomy, group),
            f"{group.effective_rank:.1f}",
        ]
        for layer, group in by_layer.items()
    ]
    totals = [_moved(anatomy, by_kind[kind]) for kind in kinds]
    total = anatomy.total
    rows.append(["all", *totals, _moved(anatomy, total), f"{total.effective_rank:.1f}"])
    unit = "% of ‖W‖" if anatomy.weighed else "rms"
    _table([f"block: {unit}", *kinds, "all", "eff. rank"], rows)
    if not kinds:
        rows = [
            [kind, group.modules, _moved(anatomy, group), f"{group.effective_rank:.1f}"]
            for kind, group in by_kind.items()
        ]
        _table(["kind", "modules", unit, "eff. rank"], rows)


def _cell(anatomy: Anatomy, group: Group | None) -> str:
    return "" if group is None else _moved(anatomy, group)


def _moved(anatomy: Anatomy, part: Any) -> str:
    value = anatomy.moved(part)
    return f"{100 * value:.3g}" if anatomy.weighed else f"{value:.2g}"


def _range(values: tuple[float, float] | None) -> str:
    return "n/a" if values is None else f"{values[0]:.3g} .. {values[1]:.3g}"


def _span(counts: Mapping[Any, int]) -> str:
    """One value, or each with the number of its modules."""
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in counts.items())


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned lines, as long as they are: in a table that fits the terminal, names are cut."""
    lines = [[_plain(cell) for cell in line] for line in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    console.out.print()
    for number, (first, *others) in enumerate(lines):
        figures = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        text = "  ".join([f"{first:{widths[0]}}", *figures])
        console.out.print(text, style=None if number else "bold", markup=False)


def _plain(value: object) -> str:
    """One line without control characters, which names in a file from anywhere may hold."""
    return "".join(c if c.isprintable() else "?" for c in str(value))
