"""`lorikeet adapter push`: upload an adapter to the Hugging Face hub."""

from __future__ import annotations

import argparse
import json

from lorikeet import console
from lorikeet.cli.options import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("folder", metavar="DIR", help="adapter folder, or a run folder with one")
    parser.add_argument("repo", metavar="REPO", help="owner/name on the hub; made if missing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Upload; print the address."""
    from lorikeet.adapters.hub import push_to_hub
    from lorikeet.cli.subject import adapter_folder

    folder = adapter_folder(args.folder)
    assert folder is not None
    url = push_to_hub(folder, args.repo, private=args.private)
    if args.json:
        console.out.print_json(json.dumps({"url": url}))
    else:
        console.out.print(url, markup=False)
    return 0
