"""Adapters: on disk in PEFT's folder format, by themselves, and in a model."""

from __future__ import annotations

from lorikeet.adapters.adapter import Adapter, Update
from lorikeet.adapters.exchange import read_adapter, write_adapter
from lorikeet.adapters.folder import load_adapter, save_adapter
from lorikeet.adapters.match import mismatches
from lorikeet.adapters.probe import Shift, logit_shift
from lorikeet.adapters.schema import AdapterInfo, read_adapter_config
from lorikeet.adapters.spectrum import Spectrum, spectrum
from lorikeet.adapters.swap import AdapterSet

__all__ = [
    "Adapter",
    "AdapterInfo",
    "AdapterSet",
    "Shift",
    "Spectrum",
    "Update",
    "load_adapter",
    "logit_shift",
    "mismatches",
    "read_adapter",
    "read_adapter_config",
    "save_adapter",
    "spectrum",
    "write_adapter",
]
