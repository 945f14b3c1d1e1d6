"""Rows -> examples -> packed batches."""

from __future__ import annotations

from lorikeet.data.batch import Batch, Epochs, micro_batches, pack
from lorikeet.data.example import Example
from lorikeet.data.layout import Layout, Message, Row, Text, Turns, detect, normalise
from lorikeet.data.prepare import Prepared, Report, preflight, prepare
from lorikeet.data.preview import preview_json, preview_text
from lorikeet.data.render import Rendered, Renderer
from lorikeet.data.source import Rows, read_rows
from lorikeet.data.template import Template, load_template
from lorikeet.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Epochs",
    "Example",
    "Layout",
    "Message",
    "Prepared",
    "Rendered",
    "Renderer",
    "Report",
    "Row",
    "Rows",
    "Template",
    "Text",
    "Tokenizer",
    "Turns",
    "detect",
    "load_template",
    "micro_batches",
    "normalise",
    "pack",
    "preflight",
    "prepare",
    "preview_json",
    "preview_text",
    "read_rows",
]
