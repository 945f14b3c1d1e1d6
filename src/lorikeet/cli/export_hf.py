"""`lorikeet export hf`: the merged model folder, as `lorikeet adapter merge` writes it."""

from __future__ import annotations

from lorikeet.cli.adapter_merge import add_arguments, run

__all__ = ["add_arguments", "run"]
