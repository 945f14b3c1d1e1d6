"""`lorikeet export ollama`: a folder that `ollama create` makes a model of."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from lorikeet import console
from lorikeet.cli.gguf_file import (
    Job,
    add_file_arguments,
    check_file_arguments,
    make,
    plan,
    require_sound,
    show,
)
from lorikeet.errors import ConfigError
from lorikeet.files import atomic_folder, disk_errors

_MODELFILE = "Modelfile"
_SHOWN = 4  # names in a message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_file_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the new folder")


def run(args: argparse.Namespace) -> int:
    """Convert, translate the chat template; with --verify also compare."""
    check_file_arguments(args)
    out = Path(args.out)
    with disk_errors(out):
        _check_place(out)
    from lorikeet.export.chat import read_generation
    from lorikeet.export.modelfile import modelfile

    job = plan(args)
    adds_bos = job.conversion.metadata.get("tokenizer.ggml.add_bos_token")
    name = _file_name(args.type)
    described = modelfile(
        name,
        job.renderer,
        adds_bos=bool(adds_bos and adds_bos.value),
        generation=read_generation(job.base),
    )
    with atomic_folder(out) as draft:
        made = make(args, job, draft / name)
        (draft / _MODELFILE).write_text(described.text, encoding="utf-8")
    made = replace(
        made,
        exported=replace(made.exported, out=out / name),
        notes=(*made.notes, *described.notes, *_unknown_template(job)),
    )
    if args.json:
        found = {**made.summary(), "modelfile": str(out / _MODELFILE)}
        console.out.print_json(json.dumps(found))
    else:
        show(made)
        console.out.print(f"ollama create NAME -f {out / _MODELFILE}", markup=False)
    require_sound(made)
    return 0


def _check_place(out: Path) -> None:
    """Refuse to replace anything but an earlier export: the folder is replaced as a whole.

    Raises:
        ConfigError: there is something else.
    """
    from lorikeet.gguf.mixture import KINDS

    if not out.is_dir():
        if out.exists():
            raise ConfigError(f"--out: {out} is a file; expected the name of a folder")
        return
    found = {entry.name for entry in out.iterdir()}
    others = sorted(found - {_MODELFILE, *map(_file_name, KINDS)})
    if others or (found and _MODELFILE not in found):
        names = others or sorted(found)
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise ConfigError(
            f"--out: {out} is there and holds what is no earlier export ({shown}), which would be"
            " lost; choose another folder"
        )


def _file_name(kind: str) -> str:
    return f"model-{kind}.gguf"


def _unknown_template(job: Job) -> list[str]:
    """A sentence if nobody has said how the model is spoken to: a Modelfile must say something."""
    if "tokenizer.chat_template" in job.conversion.metadata:
        return []
    return [
        "the model has no chat template: the Modelfile asks in the words of"
        f" {job.renderer.template.name}, which it was not trained with as far as is known;"
        " --data.template names another"
    ]
