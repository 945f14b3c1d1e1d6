"""Adapters: on disk in PEFT's folder format, by themselves, and in a model."""

from __future__ import annotations

from lorikeet.adapters.adapter import Adapter, Tokens, Update
from lorikeet.adapters.algebra import Combined, combine
from lorikeet.adapters.anatomy import Anatomy, examine
from lorikeet.adapters.base_weights import BaseWeights
from lorikeet.adapters.exchange import read_adapter, write_adapter
from lorikeet.adapters.folder import load_adapter, save_adapter
from lorikeet.adapters.match import mismatches
from lorikeet.adapters.normal import normalize
from lorikeet.adapters.probe import PROBE, Shift, logit_shift
from lorikeet.adapters.schema import AdapterInfo, read_adapter_config
from lorikeet.adapters.spectrum import Spectrum, spectrum
from lorikeet.adapters.swap import AdapterSet

__all__ = [
    "PROBE",
    "Adapter",
    "AdapterInfo",
    "AdapterSet",
    "Anatomy",
    "BaseWeights",
    "Combined",
    "Shift",
    "Spectrum",
    "Tokens",
    "Update",
    "combine",
    "examine",
    "load_adapter",
    "logit_shift",
    "mismatches",
    "normalize",
    "read_adapter",
    "read_adapter_config",
    "save_adapter",
    "spectrum",
    "write_adapter",
]
